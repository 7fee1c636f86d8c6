"""The 2D UNet of the semi-supervised literature (SSL4MIS family), written for XLA.

Numbers of the network after Wang et al., IEEE TMI 2025 (doi 10.1109/TMI.2025.3557537); U-Net after
Ronneberger et al., arXiv 1505.04597. Module names follow the PyTorch family, so weights map one to
one (`torch_weights.py`).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cgs_jax.models import packed, torch_weights
from cgs_jax.runtime.errors import UserError

MOMENTUM = 0.1  # share of each batch in the running statistics of batch norm

# PyTorch's default for convolutions, which the published numbers were made with.
conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nn.Module):
    """Convolution of one packed map, or of several as if their channels were joined.

    Returns the map without its bias [features], and the bias: batch norm cancels it.

    Attributes:
      features: output channels.
      size: of the kernel along every axis, or along each.
      pack: of the maps.
    """

    features: int
    size: int | Sequence[int]
    pack: int

    @nn.compact
    def __call__(self, *maps: jax.Array) -> tuple[jax.Array, jax.Array]:
        widths = [x.shape[-1] // self.pack for x in maps]
        axes = maps[0].ndim - 2
        sides = (self.size,) * axes if isinstance(self.size, int) else tuple(self.size)
        kernel = self.param("kernel", conv_init, (*sides, sum(widths), self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y, start = 0, 0
        for x, width in zip(maps, widths, strict=True):
            y = y + packed.conv(x, kernel[..., start : start + width, :], self.pack)
            start += width
        return y, bias


class BatchNorm(nn.Module):
    """Parameters and running statistics of batch norm; what it does to its input is left to the
    caller, who may know the statistics without looking at every pixel."""

    @nn.compact
    def __call__(
        self, mean: jax.Array | None, var: jax.Array | None, offset: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (factor, summand), float32 [C]: x * factor + summand is what batch norm makes of
        x + offset.

        Args:
          mean, var: float32 [C] of x over the batch, before `offset` is added; None takes the
            running statistics.
          offset: float32 [C], such as the bias of the convolution that made x.
        """
        shape = offset.shape
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        if mean is None:
            mean, var = running_mean.value - offset, running_var.value
        elif not self.is_initializing():
            running_mean.value += MOMENTUM * (mean + offset - running_mean.value)
            running_var.value += MOMENTUM * (var - running_var.value)
        factor = scale * jax.lax.rsqrt(var + 1e-5)
        return factor, bias - mean * factor


def statistics(x: jax.Array, pack: int) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of every channel of a packed map, float32 [C]."""
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean, square = (jnp.mean(y, axes).reshape(pack, -1).mean(0) for y in (x, x * x))
    return mean, jnp.maximum(square - mean * mean, 0)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes a share `rate` of the values, rounded to 256ths, and scales the rest.

    One random word serves four rows: drawing a word a value costs as much as a convolution.
    """
    x, back = packed.by_slice(x)
    b, h, w, c = x.shape
    drop = round(256 * rate)
    words = jax.random.bits(key, (b, -(-h // 4), 1, w, c), jnp.uint32)
    eights = words >> jnp.arange(0, 32, 8, dtype=jnp.uint32).reshape(4, 1, 1) & 255
    keep = (eights >= drop).reshape(b, -1, w, c)[:, :h]
    return back(jnp.where(keep, x * (256 / (256 - drop)), 0).astype(x.dtype))


def drop_channels(x: jax.Array, pack: int, key: jax.Array) -> jax.Array:
    """Zeroes half of the channels and doubles the rest; each image draws its own half."""
    shape = (len(x), *[1] * (x.ndim - 2), x.shape[-1] // pack)
    keep = jax.random.bernoulli(key, 0.5, shape)
    return jnp.where(jnp.tile(keep, pack), 2 * x, 0).astype(x.dtype)


class ConvBlock(nn.Module):
    """Twice conv3x3 - batch norm - LeakyReLU, dropout between them.

    Attributes:
      features: output channels.
      pack: of input and output.
      dropout: rate between the two convolutions; 0 turns it off.
      size: of the kernels, see `Conv`.
    """

    features: int
    pack: int
    dropout: float = 0.0
    size: int | Sequence[int] = 3

    @nn.compact
    def __call__(self, *maps: jax.Array, train: bool) -> jax.Array:
        for i in (1, 2):
            x, bias = Conv(self.features, self.size, self.pack, name=f"conv{i}")(*maps)
            mean, var = statistics(x, self.pack) if train else (None, None)
            factor, summand = BatchNorm(name=f"bn{i}")(mean, var, bias)
            x = nn.leaky_relu(packed.affine(x, factor, summand, self.pack), 0.01).astype(x.dtype)
            if i == 1 and train and self.dropout:
                x = dropout(x, self.dropout, self.make_rng("dropout"))
            maps = (x,)
        return x


class Backbone(nn.Module):
    """Image -> feature maps, the last at full resolution; the heads are apart (`heads.py`).

    A subclass may have kernels, pooling and upsampling of its own.

    Attributes:
      channels: width of each level, finest first; H and W must divide by 2 ** (levels - 1).
      dropout: encoder dropout of each level.
      lanes: pixels are packed until the channels fill it (`packed.py`); 1 packs none.
    """

    channels: Sequence[int] = (16, 32, 64, 128, 256)
    dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5)
    lanes: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, perturb: bool = False
    ) -> list[tuple[jax.Array, int]]:
        """[B, H, W, C] in [0, 1] -> the bottleneck and the maps of the decoder, each [B, H, W / p,
        p * channels] and its pack p, from 1/16 of the resolution (with five levels) to all of it.

        `perturb` appends a copy whose encoder maps lose half of their channels on their way to the
        decoder: [2 B, ...] (UniMatch, 2208.09910).
        """
        pack = 1
        while 2 * pack * self.channels[0] <= self.lanes and x.shape[2] % (2 * pack) == 0:
            pack *= 2
        packs = [max(pack >> i, 1) for i in range(len(self.channels))]
        x, skips = packed.pack_pixels(x, pack), []
        for i, (width, rate) in enumerate(zip(self.channels, self.dropout, strict=True)):
            x = self.pool(x, i - 1, packs[i - 1]) if i else x
            block = ConvBlock(width, packs[i], rate, self.kernel_size(i), name=f"down{i}")
            x = block(x, train=train)
            skips.append(x)
        if perturb:
            keys = jax.random.split(self.make_rng("dropout"), len(skips))
            skips = [
                jnp.concatenate([s, drop_channels(s, pack, key)])
                for s, pack, key in zip(skips, packs, keys, strict=True)
            ]
            x = skips[-1]
        maps = [(x, packs[-1])]
        for i, level in enumerate(reversed(range(len(skips) - 1)), 1):
            width, below, pack = self.channels[level], packs[level + 1], packs[level]
            y, bias = Conv(width, 1, below, name=f"up{i}_reduce")(x)
            x = packed.affine(y, None, bias, below).astype(x.dtype)
            x = self.upsample(x, level, below, pack > below)
            block = ConvBlock(width, pack, 0.0, self.kernel_size(level), name=f"up{i}")
            x = block(skips[level], x, train=train)
            maps.append((x, pack))
        return maps

    def kernel_size(self, level: int) -> int | tuple[int, ...]:
        """Of the kernels of a level, 0 at full resolution, see `Conv`."""
        return 3

    def pool(self, x: jax.Array, level: int, pack: int) -> jax.Array:
        """A map of a level, with its pack, for the next."""
        return packed.max_pool_2x2(x, pack)

    def upsample(self, x: jax.Array, level: int, pack: int, packed_twice: bool) -> jax.Array:
        """A map, with its pack, for the `level` above, whose pack may be twice as large."""
        return packed.upsample_2x(x, pack, packed_twice)


def levels(model: Any) -> int:
    """Number of maps."""
    return len(model.channels)


def stride(model: Any) -> int:
    """What the sides of images must divide by."""
    return 2 ** (len(model.channels) - 1)


def load_weights(source: str, variables: Any) -> Any:
    """`variables` of the network with the values of an `.npz` or `.safetensors` file that has the
    names of PyTorch.

    Raises:
      UserError: it can not be read, or does not fit.
    """
    return torch_weights.from_torch(torch_weights.read(source), variables, source)


def check(model: Any) -> None:
    """Raises UserError where the options of `config.model` can not be."""
    if len(model.channels) < 2:
        raise UserError("model.channels needs at least 2 levels")
    if any(type(count) is not int or count < 1 for count in model.channels):
        raise UserError(f"model.channels={model.channels}: whole numbers from 1 on, finest first")
    if len(model.dropout) != len(model.channels):
        raise UserError("model.dropout and model.channels must have the same length")
    if not all(isinstance(rate, int | float) and 0 <= rate <= 0.9 for rate in model.dropout):
        raise UserError(f"model.dropout={model.dropout}: rates are between 0 and 0.9")
