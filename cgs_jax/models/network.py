"""Networks. `build(config)` puts a backbone and its heads together."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from cgs_jax.models.heads import Generalist, Pyramid, Specialists
from cgs_jax.models.prompted import Prompted, merge
from cgs_jax.runtime.by_name import load_by_name
from cgs_jax.runtime.errors import UserError

CHOICES = {"dtype": ("float32", "bfloat16"), "head_classes": (2, 3)}


class Outputs(NamedTuple):
    """Logits of one forward pass, batch first; *S are the spatial axes."""

    generalist: jax.Array  # [B, *S, C]
    specialists: jax.Array | None  # [B, *S, K, 3 or 2]; None without specialists
    pyramid: jax.Array | None = None  # [B, *S, scales, C] of coarser maps, where there are any
    # [B, *S, K + 1, 2] of prompts, the last the synthetic task's; the generalist is merged of them
    prompts: jax.Array | None = None


class Network(nn.Module):
    """Backbone, generalist and, where there are any, specialists.

    Attributes:
      backbone: makes the feature extractor, [B, H, W, channels] -> bottleneck and maps of the
        decoder, coarsest first.
      num_classes: background included.
      specialists: makes a specialist head for every target; None: there are none.
      pyramid: whether the coarser maps have heads, too.
      prompts: whether heads that are asked for one class at a time take the generalist's place.
      dtype: of the feature maps; parameters, statistics and losses are float32.
    """

    backbone: Callable[[], nn.Module]
    num_classes: int
    specialists: Callable[[], nn.Module] | None
    pyramid: bool
    prompts: bool
    dtype: str

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False, perturb: bool = False) -> Outputs:
        """`perturb` appends the outputs of the same images with half of the encoder's channels
        dropped, so there are twice as many."""
        maps = self.backbone(name="backbone")(image.astype(self.dtype), train, perturb)
        features, pack = maps[-1]
        specialists, pyramid, prompts = None, None, None
        if self.prompts:
            prompts = Prompted(self.num_classes - 1, name="prompts")(maps[0], maps[-1], train)
            generalist = merge(prompts)
        else:
            generalist = Generalist(self.num_classes, name="generalist")(features, pack)
        if self.specialists:
            specialists = self.specialists(name="specialists")(features, pack, train)
        if self.pyramid:
            pyramid = Pyramid(self.num_classes, name="pyramid")(maps[1:-1], train)
        return Outputs(generalist, specialists, pyramid, prompts)


def build(
    config: ConfigDict, specialists: bool, pyramid: bool = False, prompts: bool = False
) -> Network:
    """Network of `config.model`, with one specialist per organ of `config.data.classes`."""
    options = dict(config.model.items())
    dtype = options.pop("dtype")
    heads = {"num_classes": options.pop("head_classes"), "depth": options.pop("head_depth")}
    heads["num_targets"] = len(config.data.classes)
    del options["name"], options["weights"]
    options["lanes"] = options["lanes"] or (128 if jax.default_backend() == "tpu" else 1)
    module = _backbone(config)
    return Network(
        backbone=lambda **kw: module.Backbone(**options, **kw),
        num_classes=len(config.data.classes) + 1,
        specialists=(lambda **kw: Specialists(**heads, **kw)) if specialists else None,
        pyramid=pyramid,
        prompts=prompts,
        dtype=dtype,
    )


def stride(config: ConfigDict) -> int:
    """What the sides of images must divide by."""
    return _backbone(config).stride(config.model)


def check(config: ConfigDict) -> None:
    """Raises UserError where an option of `config.model` has a value that can not be."""
    _backbone(config).check(config.model, config.data.size)
    for name, known in CHOICES.items():
        if (value := config.model[name]) not in known:
            known = ", ".join(map(str, known))
            raise UserError(f"unknown model.{name} {value!r}; there are: {known}")
    if config.model.head_depth < 0:
        raise UserError("model.head_depth must be at least 0")


def _backbone(config):
    return load_by_name("cgs_jax.models", config.model.name, "model")
