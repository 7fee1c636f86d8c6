"""Generalist and specialist heads on a shared feature map (Wang et al., IEEE TMI 2025)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from cgs_jax.models import packed
from cgs_jax.models.pieces import in_pieces
from cgs_jax.models.unet import BatchNorm, Conv, dropout, statistics

IN_ONE = 2**62  # bytes that no batch has

stacked_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))


class Generalist(nn.Module):
    """One convolution to all classes: packed features -> logits [B, *S, num_classes]."""

    num_classes: int

    @nn.compact
    def __call__(self, features: jax.Array, pack: int) -> jax.Array:
        y, bias = Conv(self.num_classes, 3, pack, name="conv")(features)
        return packed.unpack_pixels(packed.affine(y, None, bias, pack), pack)


class Specialists(nn.Module):
    """K heads conv1x1 - batch norm - LeakyReLU - conv3x3, parameters stacked [K, ...].

    Specialist k (0-based) separates background, target k + 1, and remaining targets, or with two
    classes its target and all else: packed features of F channels -> groups of heads, each
    [B, *S, n, num_classes].

    The parameters are those of a `nn.vmap`ped head. Only the lowering differs: `vmap` over both
    features and kernels makes XLA emit a grouped convolution, whose gradient is 40 to 60 times
    slower on CPUs. Here
    - the batch statistics of the 1x1 convolutions, linear maps of the features, follow from mean
      and covariance of the features; so batch norm is folded into the kernels, and the hidden maps
      are written once. The features are centred first, or bfloat16 would round mean and all;
    - what follows is one convolution for all heads of a group, with a block-diagonal kernel: one is
      quicker to compile than several, and tiles of GPUs do most of the zeros for nothing. Where a
      group has its losses by itself, its maps need not outlive them.

    Attributes:
      num_targets: K.
      num_classes: 3 or 2.
      depth: hidden layers; the published heads have one.
      group: heads of a group; the last may have fewer.
      piece_bytes: where there are more of hidden maps in training, and heads have one hidden layer,
        the batch is cut into pieces, whose maps are made again for the gradient.
    """

    num_targets: int
    num_classes: int = 3
    depth: int = 1
    group: int = 4
    piece_bytes: int = IN_ONE

    @nn.compact
    def __call__(self, x: jax.Array, pack: int, train: bool) -> tuple[jax.Array, ...]:
        k, f, c = self.num_targets, x.shape[-1] // pack, self.num_classes
        parts = [slice(i, i + self.group) for i in range(0, k, self.group)]
        pieces, first = self._pieces(x) if train else 1, [None] * len(parts)
        if self.depth:
            x, first = self._first_layer(x, pack, train, parts, pieces)
        if self.depth > 1:
            maps = [_hidden(x, own, pack) for own in first]
            for i in range(2, self.depth + 1):
                maps = self._hidden_layer(maps, pack, f, train, parts, i)
        kernel = self.param("conv2_kernel", stacked_init, (k, *[3] * (x.ndim - 2), f, c))
        bias = self.param("conv2_bias", nn.initializers.zeros, (k, c))
        widened = _block_diagonal if self.depth else _side_by_side
        last = [(widened(kernel[part]), bias[part]) for part in parts]
        if self.depth > 1:
            return tuple(_logits(h, *own, pack) for h, own in zip(maps, last, strict=True))

        def heads(x, groups):
            return tuple(_logits(_hidden(x, hidden, pack), *own, pack) for hidden, own in groups)

        return in_pieces(heads, pieces)(x, list(zip(first, last, strict=True)))

    def _pieces(self, x):
        """How many pieces of the batch the hidden maps are made in."""
        if self.depth != 1:
            return 1
        return min(-(-x.nbytes * self.num_targets // self.piece_bytes), len(x))

    def _first_layer(self, x, pack, train, parts, pieces):
        """The features, and of each group of heads kernel and summand of what makes hidden maps of
        them, and the means to be subtracted before. Where the batch is in pieces each of them does
        that by itself; otherwise the features come back centred, and there are no means."""
        k, f, ones = self.num_targets, x.shape[-1] // pack, [1] * (x.ndim - 2)
        kernel = self.param("conv1_kernel", stacked_init, (k, *ones, f, f))
        bias = self.param("conv1_bias", nn.initializers.zeros, (k, f))
        flat = kernel.reshape(k, f, f)
        mean, var, centre, offset = None, None, None, bias
        if train:
            pixels = tuple(range(x.ndim - 1))
            centre = jnp.mean(x.astype(jnp.float32), pixels).reshape(pack, f).mean(0)
            offset = jnp.einsum("i,kif->kf", centre, flat) + bias
            if pieces == 1:
                x, centre = _centred(x, centre, pack), None
            products = in_pieces(functools.partial(_products, pack=pack), pieces)(x, centre)
            mean, var = jnp.zeros(()), _linear_variance(products.sum(0), x.size // f, pack, flat)
        factor, summand = BatchNorm(name="bn")(mean, var, offset)
        kernel = kernel * factor.reshape(k, *ones, 1, f)
        return x, [(_side_by_side(kernel[part]), summand[part].ravel(), centre) for part in parts]

    def _hidden_layer(self, maps, pack, f, train, parts, i):
        k, ones = self.num_targets, [1] * (maps[0].ndim - 2)
        kernel = self.param(f"hidden{i}_kernel", stacked_init, (k, *ones, f, f))
        bias = self.param(f"hidden{i}_bias", nn.initializers.zeros, (k, f))
        maps = [
            packed.conv(h, _block_diagonal(kernel[part]), pack)
            for h, part in zip(maps, parts, strict=True)
        ]
        mean, var = None, None
        if train:
            known = zip(*(statistics(h, pack) for h in maps), strict=True)
            mean, var = (jnp.concatenate(x).reshape(k, f) for x in known)
        factor, summand = BatchNorm(name=f"bn{i}")(mean, var, bias)
        for j, (h, part) in enumerate(zip(maps, parts, strict=True)):
            y = packed.affine(h, factor[part].ravel(), summand[part].ravel(), pack)
            maps[j] = nn.leaky_relu(y, 0.01).astype(h.dtype)
        return maps


class Pyramid(nn.Module):
    """Auxiliary heads on the coarser maps of the decoder (URPC, 2012.07042).

    In training each reads its map perturbed in a way of its own: noise at 1/2 of the resolution,
    the most active pixels left out at 1/4, dropout at 1/8 and below. Maps are coarsest first;
    returns logits [B, *S, scales, num_classes], upsampled to the nearest, finest first.
    """

    num_classes: int

    @nn.compact
    def __call__(
        self, maps: list[tuple[jax.Array, int]], shape: tuple[int, ...], train: bool
    ) -> jax.Array:
        """`shape` is S."""
        logits = []
        for i, (x, pack) in enumerate(reversed(maps), 1):
            x = packed.unpack_pixels(x, pack)
            if train:
                x = self._perturb(x, i, self.make_rng("dropout"))
            y = Generalist(self.num_classes, name=f"head{i}")(x, 1)
            for axis, size in enumerate(shape, 1):
                y = jnp.repeat(y, size // y.shape[axis], axis)
            logits.append(y)
        return jnp.stack(logits, -2)

    def _perturb(self, x, i, key):
        if i == 1:
            noise = jax.random.uniform(key, x.shape[1:], minval=-0.3, maxval=0.3)
            return (x * (1 + noise)).astype(x.dtype)
        if i == 2:
            active = jnp.mean(x, -1, keepdims=True)
            share = jax.random.uniform(key, (), minval=0.7, maxval=0.9)
            pixels = tuple(range(1, x.ndim))
            return jnp.where(active < share * jnp.max(active, pixels, keepdims=True), x, 0)
        return dropout(x, 0.5, key)


def _side_by_side(kernel):
    """[n, *sides, f, c] -> [*sides, f, n c]: n convolutions of one map as one."""
    return jnp.moveaxis(kernel, 0, -2).reshape(*kernel.shape[1:-1], -1)


def _block_diagonal(kernel):
    """[n, *sides, f, c] -> [*sides, n f, n c]: a convolution of each of n maps as one of all."""
    n, *sides, f, c = kernel.shape
    blocks = jnp.einsum("k...fc,kl->...kflc", kernel, jnp.eye(n))
    return blocks.reshape(*sides, n * f, n * c)


def _centred(x, centre, pack):
    return x if centre is None else packed.affine(x, None, -centre, pack).astype(x.dtype)


def _hidden(x, layer, pack):
    """Features -> hidden maps of n heads, side by side; without such a layer the features."""
    if layer is None:
        return x
    kernel, summand, centre = layer
    y = packed.affine(packed.conv(_centred(x, centre, pack), kernel, pack), None, summand, pack)
    return nn.leaky_relu(y, 0.01).astype(x.dtype)


def _logits(x, kernel, bias, pack):
    """[B, *S, n, c] of n heads."""
    y = packed.affine(packed.conv(x, kernel, pack), None, bias.ravel(), pack)
    y = packed.unpack_pixels(y, pack)
    return y.reshape(*y.shape[:-1], *bias.shape)


def _products(x, centre, pack):
    """Sums over all pixels of the products of centred channels: [1, C, C], so that the sums of
    several pieces of a batch can be put in a row."""
    x = _centred(x, centre, pack)
    return jnp.einsum("b...i,b...j->ij", x, x, preferred_element_type=jnp.float32)[None]


def _linear_variance(products, pixels, pack, kernel):
    """Variance [K, F] of `x @ kernel[k]` over the pixels of a centred map, from the sums of the
    products of its channels."""
    f = kernel.shape[1]
    covariance = jnp.einsum("pipj->ij", products.reshape(pack, f, pack, f)) / pixels
    var = jnp.einsum("kif,ij,kjf->kf", kernel, covariance, kernel)
    return jnp.maximum(var, 0)
