"""Networks. `build(config)` puts a backbone and its heads together."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from cgs_jax.models.heads import Generalist, Specialists
from cgs_jax.modules import load_by_name


class Outputs(NamedTuple):
    """Logits of one forward pass."""

    generalist: jax.Array  # [B, H, W, C]
    specialists: jax.Array | None  # [K, B, H, W, 3]; None without specialists


class Network(nn.Module):
    """Backbone, generalist and, where there are any, specialists.

    Attributes:
      backbone: makes the feature extractor, [B, H, W, 1] -> packed features and their pack.
      num_classes: background included.
      specialists: whether every target has a specialist head.
      dtype: of the feature maps; parameters, statistics and losses are float32.
    """

    backbone: Callable[[], nn.Module]
    num_classes: int
    specialists: bool
    dtype: str

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False, perturb: bool = False) -> Outputs:
        """`perturb` appends the outputs of the same images with half of the encoder's channels
        dropped, so there are twice as many."""
        backbone = self.backbone(name="backbone")
        features, pack = backbone(image.astype(self.dtype), train, perturb)
        generalist = Generalist(self.num_classes, name="generalist")(features, pack)
        if not self.specialists:
            return Outputs(generalist, None)
        heads = Specialists(self.num_classes - 1, name="specialists")
        return Outputs(generalist, heads(features, pack, train))


def build(config: ConfigDict, specialists: bool) -> Network:
    """Network of `config.model`, with one specialist per organ of `config.data.classes`."""
    options = {k: v for k, v in config.model.items() if k not in ("name", "weights", "dtype")}
    options["lanes"] = options["lanes"] or (128 if jax.default_backend() == "tpu" else 1)
    module = load_by_name("cgs_jax.models", config.model.name, "model")
    return Network(
        backbone=lambda **kw: module.Backbone(**options, **kw),
        num_classes=len(config.data.classes) + 1,
        specialists=specialists,
        dtype=config.model.dtype,
    )
