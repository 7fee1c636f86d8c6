"""Feature maps whose neighbouring pixels of a row share the channel axis.

With pack p, a map [B, H, W, C] is stored as [B, H, W / p, p * C]. A tile of a TPU is 128 channels
wide: 16 would leave 7/8 of it, and of the memory traffic, empty. Tiles of GPUs are 64 or 128 wide.
Pack 1 is the plain map.

Inside a pack the pixels stand in bit-reversed order, even ones in the first half of the channels
and odd ones in the second, at every depth. So pooling is a maximum of two halves, upsampling puts
two halves side by side, and either halves or doubles the pack.

Maps of volumes [B, D, H, W, C] have pack 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def order(pack: int) -> np.ndarray:
    """Pixel that each position of a pack holds; `pack` is a power of two."""
    if pack == 1:
        return np.zeros(1, int)
    half = 2 * order(pack // 2)
    return np.concatenate([half, half + 1])


def pack_pixels(x: jax.Array, pack: int) -> jax.Array:
    """[B, H, W, C] -> [B, H, W / pack, pack * C]."""
    if pack == 1:
        return x
    b, h, w, c = x.shape
    return _reverse_bits(x, pack).reshape(b, h, w // pack, pack * c)


def unpack_pixels(x: jax.Array, pack: int) -> jax.Array:
    """[B, H, W / pack, pack * C] -> [B, H, W, C]."""
    if pack == 1:
        return x
    b, h, w, c = x.shape
    return _reverse_bits(x.reshape(b, h, w * pack, c // pack), pack)


def _reverse_bits(x, pack):
    bits = pack.bit_length() - 1
    split = x.reshape(*x.shape[:2], -1, *[2] * bits, x.shape[-1])
    axes = [0, 1, 2, *reversed(range(3, 3 + bits)), 3 + bits]
    return split.transpose(axes).reshape(x.shape)


def conv(x: jax.Array, kernel: jax.Array, pack: int) -> jax.Array:
    """Convolution of a packed map by a plain kernel [k, k, C, D], k odd, same padding; or of a map
    of volumes by [k, k, k, C, D], whose first side may be another odd number.

    The kernel of a packed map is block-Toeplitz: output pixel j of a pack reads input pixel
    j + offset, of this pack or of a neighbour.
    """
    kernel = kernel.astype(x.dtype)
    if pack > 1:
        kh, kw, c, d = kernel.shape
        pixel = order(pack)
        source = pixel[None, :] + pack * (np.arange(kw) - kw // 2)[:, None]  # [neighbour, position]
        offset = source[:, :, None] - pixel[None, None, :] + kw // 2
        taps = jnp.asarray(offset[..., None] == np.arange(kw), x.dtype)
        kernel = jnp.einsum("nijt,ytcd->ynicjd", taps, kernel)
        kernel = kernel.reshape(kh, kw, pack * c, pack * d)
    *sides, c, d = kernel.shape
    if max(sides) == 1:  # a matrix product: its gradient is one, too
        return x @ kernel.reshape(c, d)
    if x.ndim == 5:
        return jax.lax.platform_dependent(x, kernel, cpu=_by_slices, default=_convolution)
    return _convolution(x, kernel)


def _convolution(x, kernel):
    axes = "DHW"[-(x.ndim - 2) :]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    strides = (1,) * (x.ndim - 2)
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=numbers)


@jax.checkpoint  # the joined slices are made again for the gradient
def _by_slices(x, kernel):
    """The same of volumes as a convolution of slices, to which their neighbours' channels are
    joined: XLA has no fast convolution of volumes for CPUs, where this one and its gradient take a
    fifth of the time or less."""
    depth, (sides, *plane, c, d) = x.shape[1], kernel.shape
    padded = jnp.pad(x, ((0, 0), (sides // 2, sides // 2), *[(0, 0)] * 3))
    joined = jnp.concatenate([padded[:, i : i + depth] for i in range(sides)], -1)
    slices, back = by_slice(joined)
    return back(_convolution(slices, jnp.moveaxis(kernel, 0, 2).reshape(*plane, sides * c, d)))


def by_slice(x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """A map of volumes [B, D, H, W, C] as one of slices [B D, H, W, C], and what undoes it for any
    H, W and C; a map of slices as it is."""
    if x.ndim == 4:
        return x, lambda y: y
    stacks = x.shape[:2]
    return x.reshape(-1, *x.shape[2:]), lambda y: y.reshape(*stacks, *y.shape[1:])


def affine(x: jax.Array, factor: jax.Array | None, summand: jax.Array, pack: int) -> jax.Array:
    """x * factor + summand by channel, in float32: sums over bfloat16 gradients would be noise."""
    x = x.astype(jnp.float32)
    if factor is not None:
        x = x * jnp.tile(factor, pack)
    return x + jnp.tile(summand, pack)


def max_pool_2x2(x: jax.Array, pack: int) -> jax.Array:
    """Halves H and W; the pack halves, too, unless it is 1.

    Elementwise maxima: the gradient of a reduce-window maximum is a select-and-scatter, the slowest
    operation of the step on every backend. Strided slices leave the layout of a map to the
    convolutions around, and rows that are split over devices where they are.
    """
    x = jnp.maximum(x[:, 0::2], x[:, 1::2])
    if pack == 1:
        return jnp.maximum(x[:, :, 0::2], x[:, :, 1::2])
    even, odd = jnp.split(x, 2, -1)
    return jnp.maximum(even, odd)


def upsample_2x(x: jax.Array, pack: int, packed: bool) -> jax.Array:
    """Doubles H and W bilinearly with corner-aligned grids (torch's `align_corners=True`).

    The result has twice the pack if `packed`, else `pack` must be 1 and stays.
    """
    even, odd = _between(x, pack)
    if packed:
        x = jnp.concatenate([even, odd], -1)
    else:
        x = jnp.stack([even, odd], 3).reshape(*x.shape[:2], -1, x.shape[-1])
    return double_rows(x)


def double_rows(x: jax.Array) -> jax.Array:
    """Doubles H of [B, H, W, C], linearly, in the same way."""
    even, odd = (y.swapaxes(1, 2) for y in _between(x.swapaxes(1, 2), 1))
    return jnp.stack([even, odd], 2).reshape(x.shape[0], -1, *x.shape[2:])


def _between(x: jax.Array, pack: int) -> tuple[jax.Array, jax.Array]:
    """The even and the odd columns of the map twice as wide.

    Source position of output 2j is j - j/(2n-1), of output 2j+1 it is j + (n-1-j)/(2n-1): both lie
    next to j, so neighbours and two ramps do it, without gather or matrix.
    """
    n = x.shape[2] * pack
    column = pack * np.arange(x.shape[2])[:, None] + order(pack)
    column = np.repeat(column, x.shape[3] // pack, axis=1)
    ramp, back = (jnp.asarray(r / (2 * n - 1), x.dtype) for r in (column, n - 1 - column))
    even = x + ramp * (_previous(x, pack) - x)  # what wraps round has weight 0
    odd = x + back * (_next(x, pack) - x)
    return even, odd


def _previous(x, pack):
    """For every pixel its left neighbour, wrapping round."""
    if pack == 1:
        return jnp.roll(x, 1, 2)
    even, odd = jnp.split(x, 2, -1)
    return jnp.concatenate([_previous(odd, pack // 2), even], -1)


def _next(x, pack):
    if pack == 1:
        return jnp.roll(x, -1, 2)
    even, odd = jnp.split(x, 2, -1)
    return jnp.concatenate([odd, _next(even, pack // 2)], -1)
