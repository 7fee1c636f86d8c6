"""The encoder of TransUNet in plain numpy, and the names of its parameters."""

import numpy as np
from scipy import special


def table(units, width, hidden, mlp, heads, layers, tokens, inputs=3):
    """Key -> shape of the public checkpoints, without their classifier."""
    shapes = {"conv_root/kernel": (7, 7, inputs, width)}
    norms = {"gn_root": width}
    c = width
    for b, count in enumerate(units):
        m = width << b
        for u in range(1, count + 1):
            unit = f"block{b + 1}/unit{u}"
            shapes[f"{unit}/conv1/kernel"] = (1, 1, c, m)
            shapes[f"{unit}/conv2/kernel"] = (3, 3, m, m)
            shapes[f"{unit}/conv3/kernel"] = (1, 1, m, 4 * m)
            norms |= {f"{unit}/gn1": m, f"{unit}/gn2": m, f"{unit}/gn3": 4 * m}
            if u == 1:
                shapes[f"{unit}/conv_proj/kernel"] = (1, 1, c, 4 * m)
                norms[f"{unit}/gn_proj"] = 4 * m
            c = 4 * m
    shapes |= {"embedding/kernel": (1, 1, c, hidden), "embedding/bias": (hidden,)}
    shapes["Transformer/posembed_input/pos_embedding"] = (1, tokens, hidden)
    norms["Transformer/encoder_norm"] = hidden
    for i in range(layers):
        block = f"Transformer/encoderblock_{i}"
        norms |= {f"{block}/LayerNorm_0": hidden, f"{block}/LayerNorm_2": hidden}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            shapes[f"{attention}/{name}/kernel"] = (hidden, heads, hidden // heads)
            shapes[f"{attention}/{name}/bias"] = (heads, hidden // heads)
        shapes[f"{attention}/out/kernel"] = (heads, hidden // heads, hidden)
        shapes[f"{attention}/out/bias"] = (hidden,)
        shapes[f"{block}/MlpBlock_3/Dense_0/kernel"] = (hidden, mlp)
        shapes[f"{block}/MlpBlock_3/Dense_0/bias"] = (mlp,)
        shapes[f"{block}/MlpBlock_3/Dense_1/kernel"] = (mlp, hidden)
        shapes[f"{block}/MlpBlock_3/Dense_1/bias"] = (hidden,)
    for name, width in norms.items():
        shapes |= {f"{name}/scale": (width,), f"{name}/bias": (width,)}
    return shapes


def _standardise(kernel, form):
    mean, std = kernel.mean((0, 1, 2)), kernel.std((0, 1, 2))
    return (kernel - mean) / (std + 1e-5 if form == "google" else np.sqrt(std**2 + 1e-5))


def _windows(x, size, stride, edges, fill):
    x = np.pad(x, ((0, 0), edges, edges, (0, 0)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]


def _conv(x, kernel, form, stride=1):
    size = len(kernel)
    edges = (size // 2, size // 2)
    if stride == 2 and form == "google" and size > 1:
        edges = (size // 2 - 1, size // 2)
    return np.einsum(
        "bhwcyx,yxcd->bhwd", _windows(x, size, stride, edges, 0), _standardise(kernel, form)
    )


def _group_norm(x, p, groups, epsilon=1e-6):
    parts = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, var = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
    return ((parts - mean) / np.sqrt(var + epsilon)).reshape(x.shape) * p["scale"] + p["bias"]


def _unit(x, p, stride, form):
    y = np.maximum(_group_norm(_conv(x, p["conv1"]["kernel"], form), p["gn1"], 4), 0)
    y = np.maximum(_group_norm(_conv(y, p["conv2"]["kernel"], form, stride), p["gn2"], 4), 0)
    y = _group_norm(_conv(y, p["conv3"]["kernel"], form), p["gn3"], 4)
    if "conv_proj" in p:
        x = _conv(x, p["conv_proj"]["kernel"], form, stride)
        groups, epsilon = (4, 1e-6) if form == "google" else (x.shape[-1], 1e-5)
        x = _group_norm(x, p["gn_proj"], groups, epsilon)
    return np.maximum(x + y, 0)


def _layer_norm(x, p):
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normed * p["scale"] + p["bias"]


def _transformer(x, p, form):
    block, x = p["encoderblock_0"], x + p["posembed_input"]["pos_embedding"]
    y, a = _layer_norm(x, block["LayerNorm_0"]), block["MultiHeadDotProductAttention_1"]
    q, k, v = (
        np.einsum("bnd,dhe->bhne", y, a[name]["kernel"]) + a[name]["bias"][:, None]
        for name in ("query", "key", "value")
    )
    shares = special.softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]), -1)
    x = x + np.einsum("bhne,hed->bnd", shares @ v, a["out"]["kernel"]) + a["out"]["bias"]
    first, second = (block["MlpBlock_3"][name] for name in ("Dense_0", "Dense_1"))
    y = _layer_norm(x, block["LayerNorm_2"]) @ first["kernel"] + first["bias"]
    if form == "google":
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    else:
        y = y / 2 * (1 + special.erf(y / np.sqrt(2)))
    return _layer_norm(x + y @ second["kernel"] + second["bias"], p["encoder_norm"])


def encoder(image, p, form):
    """Grey images [B, H, W, 1] -> maps at 1/2, 1/4 and 1/8, and that of the transformer.

    Norms have four groups, the transformer has one layer.
    """
    x = _conv(np.repeat(image, 3, -1), p["conv_root"]["kernel"], form, 2)
    x = np.maximum(_group_norm(x, p["gn_root"], 4), 0)
    skips = [x]
    edges = (0, 1) if form == "google" else (0, 0)
    x = _windows(x, 3, 2, edges, -np.inf).max((-2, -1))
    for block, stride in (("block1", 1), ("block2", 2), ("block3", 2)):
        for unit, params in p[block].items():
            x = _unit(x, params, stride if unit == "unit1" else 1, form)
        skips.append(x)
    if form == "torch":
        skips[1] = np.pad(skips[1], ((0, 0), (0, 1), (0, 1), (0, 0)))
    tokens = x @ p["embedding"]["kernel"][0, 0] + p["embedding"]["bias"]
    out = _transformer(tokens.reshape(len(x), -1, tokens.shape[-1]), p["Transformer"], form)
    return skips[:3], out.reshape(tokens.shape)
