"""TransUNet (Chen et al., arXiv 2102.04306): ResNet, transformer, and a decoder with skips.

Built from the published numbers of R50-ViT-B/16 with three skips. The default form of the encoder
is the one that its public weights were trained in, 'google'; `model.form='torch'` is the published
network's (`resnet_vit.py` says where they differ).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cgs_jax.models import packed, vit_weights
from cgs_jax.models.resnet_vit import FORMS, Encoder
from cgs_jax.models.unet import BatchNorm, conv_init, drop_channels, statistics
from cgs_jax.runtime.errors import UserError, check_choice

load_weights = vit_weights.load


class ConvNorm(nn.Module):
    """conv3x3 without bias - batch norm - ReLU, to `features` channels."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        kernel = self.param("kernel", conv_init, (3, 3, x.shape[-1], self.features))
        x = packed.conv(x, kernel, 1)
        mean, var = statistics(x, 1) if train else (None, None)
        factor, summand = BatchNorm(name="bn")(mean, var, jnp.zeros(self.features))
        return nn.relu(packed.affine(x, factor, summand, 1)).astype(x.dtype)


class Backbone(nn.Module):
    """Image -> feature maps, the last at full resolution; the heads are apart (`heads.py`).

    Attributes:
      form, units, width, groups, hidden, mlp, heads, layers, dropout: of `resnet_vit.Encoder`.
      decoder: channels of the bottleneck and of the four maps of the decoder, coarsest first.
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
    decoder: Sequence[int]

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, perturb: bool = False
    ) -> list[tuple[jax.Array, int]]:
        """[B, H, W, C] in [0, 1] -> the bottleneck at 1/16 of the resolution and the maps at 1/8,
        1/4, 1/2 and 1, [B, h, w, channels] each, with pack 1.

        `perturb` appends a copy in which the three skips and the map of the transformer lose half
        of their channels: [2 B, ...] (UniMatch, 2208.09910).
        """
        resnet = (self.form, self.units, self.width, self.groups)
        vit = (self.hidden, self.mlp, self.heads, self.layers, self.dropout)
        skips, x = Encoder(*resnet, *vit, name="encoder")(x, train)
        if perturb:
            keys = jax.random.split(self.make_rng("dropout"), 1 + len(skips))
            x, *skips = (
                jnp.concatenate([y, drop_channels(y, 1, key)])
                for y, key in zip([x, *skips], keys, strict=True)
            )
        first, *others = self.decoder
        x = ConvNorm(first, name="conv_more")(x, train)
        maps = [(x, 1)]
        for i, features in enumerate(others, 1):
            x = packed.upsample_2x(x, 1, False)
            if skips:
                x = jnp.concatenate([x, skips.pop()], -1)
            for j in (1, 2):
                x = ConvNorm(features, name=f"cup{i}_conv{j}")(x, train)
            maps.append((x, 1))
        return maps


def levels(model: Any) -> int:
    """Number of maps."""
    return len(model.decoder)


def stride(model: Any) -> int:
    """What the sides of images must divide by."""
    return 16


def check(model: Any) -> None:
    """Raises UserError where the options of `config.model` can not be."""
    check_choice("model.form", model.form, FORMS)
    for name, length in (("units", 3), ("decoder", 5)):
        if len(model[name]) != length or min(model[name]) < 1:
            raise UserError(f"model.{name}={model[name]} must be {length} positive numbers")
    for name in ("groups", "hidden", "mlp", "heads", "layers"):
        if model[name] < 1:
            raise UserError(f"model.{name} must be at least 1")
    features = round(64 * model.width)
    if features < 1 or features % model.groups:
        raise UserError(
            f"model.width={model.width} makes {features} channels, which must divide by "
            f"model.groups={model.groups}"
        )
    if model.hidden % model.heads:
        raise UserError(f"model.hidden={model.hidden} must divide by model.heads={model.heads}")
    if not 0 <= model.dropout <= 0.9:
        raise UserError(f"model.dropout={model.dropout} must be between 0 and 0.9")
