"""ResNet and vision transformer one after the other: the encoder of TransUNet.

Hybrid after Dosovitskiy et al., arXiv 2010.11929, with group norm and standardised kernels in the
ResNet. Modules have the names of the public Flax checkpoints, so weights map one to one
(`vit_weights.py`).

There are two forms. 'google' is what those weights were trained in. 'torch' is that of the
published TransUNet, which differs in five places: padding of strided convolutions and of the
pooling, the norm of projections, how kernels are standardised, and the GELU.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cgs_jax.models import packed
from cgs_jax.models.unet import dropout

FORMS = ("google", "torch")


def standardise(kernel: jax.Array, form: str) -> jax.Array:
    """[h, w, C, D] with mean 0 and deviation 1 for each of D (Qiao et al., arXiv 1903.10520)."""
    kernel = kernel - jnp.mean(kernel, (0, 1, 2))
    variance = jnp.mean(kernel * kernel, (0, 1, 2))
    if form == "google":
        return kernel / (jnp.sqrt(variance) + 1e-5)
    return kernel * jax.lax.rsqrt(variance + 1e-5)


class StdConv(nn.Module):
    """Convolution by a standardised kernel, without bias.

    Attributes:
      features: output channels.
      size: of the square kernel, odd.
      form: see above.
      stride: 1 or 2.
    """

    features: int
    size: int
    form: str
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = standardise(kernel, self.form).astype(x.dtype)
        if self.stride == 1:  # both forms pad alike
            return packed.conv(x, kernel, 1)
        edge = (self.size // 2, self.size // 2)
        padding = "SAME" if self.form == "google" else (edge, edge)
        stride, numbers = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=numbers)


def group_norm(x: jax.Array, groups: int, name: str, epsilon: float = 1e-6) -> jax.Array:
    """Inside a module: its group norm `name`, in float32."""
    norm = nn.GroupNorm(groups, epsilon=epsilon, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, name: str) -> jax.Array:
    """Inside a module: its layer norm `name`, in float32."""
    return nn.LayerNorm(epsilon=1e-6, name=name)(x.astype(jnp.float32)).astype(x.dtype)


def max_pool(x: jax.Array, form: str) -> jax.Array:
    """3 x 3 with stride 2, of a map without negative values.

    'google' pads one row and column at the end, so that sides halve; 'torch' pads nothing, so they
    are one less. Maxima of slices: the gradient of a reduce-window is slow everywhere.
    """
    if form == "google":
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    for axis in (1, 2):
        last = 2 * ((x.shape[axis] - 1) // 2) - 1
        taps = (jax.lax.slice_in_dim(x, i, last + i, 2, axis) for i in range(3))
        x = functools.reduce(jnp.maximum, taps)
    return x


class Unit(nn.Module):
    """Residual unit: conv1x1, conv3x3, conv1x1, with group norm and ReLU.

    Attributes:
      features: channels inside; the output has four times as many.
      stride: of the conv3x3.
      project: whether the residual is projected, too, as in the first unit of a block.
      groups: of the norms.
      form: see above.
    """

    features: int
    stride: int
    project: bool
    groups: int
    form: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide, conv = 4 * self.features, functools.partial(StdConv, form=self.form)
        y = conv(self.features, 1, name="conv1")(x)
        y = nn.relu(group_norm(y, self.groups, "gn1"))
        y = conv(self.features, 3, stride=self.stride, name="conv2")(y)
        y = nn.relu(group_norm(y, self.groups, "gn2"))
        y = group_norm(conv(wide, 1, name="conv3")(y), self.groups, "gn3")
        if self.project:
            groups, epsilon = (self.groups, 1e-6) if self.form == "google" else (wide, 1e-5)
            x = conv(wide, 1, stride=self.stride, name="conv_proj")(x)
            x = group_norm(x, groups, "gn_proj", epsilon)
        return nn.relu(x + y)


class Block(nn.Module):
    """Units of one resolution; the first has the stride. Attributes as those of `Unit`."""

    features: int
    units: int
    stride: int
    groups: int
    form: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.units):
            stride = 1 if i else self.stride
            unit = Unit(self.features, stride, not i, self.groups, self.form, name=f"unit{i + 1}")
            x = unit(x)
        return x


def zoom(positions: jax.Array, height: int, width: int) -> jax.Array:
    """Position embeddings [1, n n, D] of a square grid -> [1, height, width, D], bilinear.

    The corners of both grids lie on each other.
    """
    n = math.isqrt(positions.shape[1])

    def hats(count):
        places = np.linspace(0, n - 1, count)
        return np.maximum(1 - np.abs(places[:, None] - np.arange(n)), 0).astype(np.float32)

    grid = positions.reshape(n, n, -1)
    if (height, width) != (n, n):
        rows, columns = hats(height), hats(width)
        grid = jnp.einsum("hi,wj,ijd->hwd", rows, columns, grid, precision="highest")
    return grid[None]


class Positions(nn.Module):
    """Adds a learned embedding of the place to a map [B, H, W, D].

    It is made for the size of the first image, a square; on maps of other sizes it is zoomed.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, depth = x.shape
        if self.has_variable("params", "pos_embedding"):
            positions = self.get_variable("params", "pos_embedding")
        else:
            shape = (1, height * width, depth)
            positions = self.param("pos_embedding", nn.initializers.normal(0.02), shape)
        return x + zoom(positions, height, width).astype(x.dtype)


class Mlp(nn.Module):
    """Two layers with GELU between them, dropout after each.

    Attributes:
      width: of the hidden layer.
      dropout: rate.
      form: see above.
    """

    width: int
    dropout: float
    form: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        inits = (nn.initializers.xavier_uniform(), nn.initializers.normal(1e-6))
        dense = functools.partial(nn.Dense, dtype=x.dtype, kernel_init=inits[0], bias_init=inits[1])
        y = nn.gelu(dense(self.width, name="Dense_0")(x), approximate=self.form == "google")
        y = _dropout(self, y, train)
        return _dropout(self, dense(x.shape[-1], name="Dense_1")(y), train)


class EncoderBlock(nn.Module):
    """Attention and MLP, each after a layer norm and added to its input [B, H, W, D].

    Attributes:
      mlp: hidden width of the MLP.
      heads: of the attention.
      dropout: rate in the MLP.
      form: see above.
    """

    mlp: int
    heads: int
    dropout: float
    form: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        tokens = layer_norm(x, "LayerNorm_0").reshape(len(x), -1, x.shape[-1])
        attention = nn.MultiHeadDotProductAttention(
            self.heads,
            dtype=x.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            force_fp32_for_softmax=True,
            name="MultiHeadDotProductAttention_1",
        )
        x = x + attention(tokens).reshape(x.shape)
        mlp = Mlp(self.mlp, self.dropout, self.form, name="MlpBlock_3")
        return x + mlp(layer_norm(x, "LayerNorm_2"), train)


class Transformer(nn.Module):
    """Embedded patches [B, H, W, D] -> [B, H, W, D]. Attributes as those of `Encoder`."""

    mlp: int
    heads: int
    layers: int
    dropout: float
    form: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = _dropout(self, Positions(name="posembed_input")(x), train)
        for i in range(self.layers):
            options = (self.mlp, self.heads, self.dropout, self.form)
            x = EncoderBlock(*options, name=f"encoderblock_{i}")(x, train)
        return layer_norm(x, "encoder_norm")


class Encoder(nn.Module):
    """Image -> maps of the ResNet, and what the transformer makes of its last.

    Attributes:
      form: 'google' or 'torch'.
      units: of each of three blocks.
      width: factor of the ResNet's channels, which are 64, 256, 512 and 1024.
      groups: of the group norms.
      hidden: width of the transformer, divides by `heads`.
      mlp, heads, layers: of the transformer.
      dropout: rate after the position embedding and in the MLPs.
    """

    form: str
    units: Sequence[int]
    width: float
    groups: int
    hidden: int
    mlp: int
    heads: int
    layers: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[list[jax.Array], jax.Array]:
        """[B, H, W, C], H and W divide by 16 -> maps at 1/2, 1/4 and 1/8, and [B, H / 16, W / 16,
        hidden]. One channel is repeated to three, for which there are weights; other images are
        taken as they are."""
        _, height, width, channels = x.shape
        x = jnp.repeat(x, 3, -1) if channels == 1 else x
        features = round(64 * self.width)
        x = StdConv(features, 7, self.form, 2, name="conv_root")(x)
        x = nn.relu(group_norm(x, self.groups, "gn_root"))
        skips = [x]
        x = max_pool(x, self.form)
        for i, units in enumerate(self.units):
            block = (features << i, units, 2 if i else 1, self.groups, self.form)
            x = Block(*block, name=f"block{i + 1}")(x)
            skips.append(x)
        *skips, x = skips
        missing = ((0, height // 4 - skips[1].shape[1]), (0, width // 4 - skips[1].shape[2]))
        skips[1] = jnp.pad(skips[1], ((0, 0), *missing, (0, 0)))  # what 'torch' pools away
        x = nn.Conv(self.hidden, (1, 1), dtype=x.dtype, name="embedding")(x)
        options = (self.mlp, self.heads, self.layers, self.dropout, self.form)
        return skips, Transformer(*options, name="Transformer")(x, train)


def _dropout(module, x, train):
    """By the rate of `module`."""
    if not train or not module.dropout:
        return x
    return dropout(x, module.dropout, module.make_rng("dropout"))
