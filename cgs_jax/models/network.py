"""Networks. `build(config)` puts a backbone and its heads together."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from cgs_jax.models.heads import IN_ONE, Generalist, Pyramid, Specialists
from cgs_jax.models.prompted import Prompted, merge
from cgs_jax.runtime.by_name import load_by_name
from cgs_jax.runtime.errors import UserError, check_choice

# Options of `config.model` that do not belong to the backbone.
SHARED = ("name", "dtype", "head_classes", "head_depth", "head_group", "head_bytes", "weights")
CHOICES = {"dtype": ("float32", "bfloat16"), "head_classes": (2, 3)}


class Outputs(NamedTuple):
    """Logits of one forward pass, batch first; *S are the spatial axes."""

    generalist: jax.Array  # [B, *S, C]
    # Groups of specialists, [B, *S, n, 3 or 2] each, K in all; None: there are none.
    specialists: tuple[jax.Array, ...] | None
    pyramid: jax.Array | None = None  # [B, *S, scales, C] of coarser maps, where there are any
    # [B, *S, K + 1, 2] of prompts, the last the synthetic task's; the generalist is merged of them
    prompts: jax.Array | None = None

    @property
    def heads(self) -> tuple[int, int]:
        """How many specialists there are, and how many classes each has."""
        return sum(x.shape[-2] for x in self.specialists), self.specialists[0].shape[-1]


class Network(nn.Module):
    """Backbone, generalist and, where there are any, specialists.

    Attributes:
      backbone: makes the feature extractor, [B, *S, channels] -> bottleneck and maps of the
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
            pyramid = Pyramid(self.num_classes, name="pyramid")(
                maps[1:-1], generalist.shape[1:-1], train
            )
        return Outputs(generalist, specialists, pyramid, prompts)


def build(
    config: ConfigDict, specialists: bool, pyramid: bool = False, prompts: bool = False
) -> Network:
    """Network of `config.model`, with one specialist per organ of `config.data.classes`."""
    module, model = backbone(config), ConfigDict(config.model.to_dict())
    choose_lowering(model, jax.default_backend())
    options = _own(model)
    heads = {"num_classes": model.head_classes, "depth": model.head_depth}
    heads |= {"group": model.head_group, "piece_bytes": model.head_bytes}
    heads["num_targets"] = len(config.data.classes)
    return Network(
        backbone=lambda **kw: module.Backbone(**options, **kw),
        num_classes=len(config.data.classes) + 1,
        specialists=(lambda **kw: Specialists(**heads, **kw)) if specialists else None,
        pyramid=pyramid,
        prompts=prompts,
        dtype=model.dtype,
    )


# How wide packed channels become by default. On an H100 a step of CGS on 24 slices of 256 x 256
# takes 9.8 ms with 64, and 13.1 with 1, in bfloat16.
LANES = {"tpu": 128, "gpu": 64}
# How many specialists share a convolution by default; elsewhere 4. One by one, a step on a v5e has
# a seventh less memory and a tenth fewer FLOPs; on CPUs it is as fast, and compiles longer.
HEAD_GROUP = {"tpu": 1}
# Beyond how many bytes specialists' hidden maps are made in pieces by default; elsewhere, and where
# several devices share a batch, never. On a CPU a step on 24 slices of 256 x 256 has a quarter less
# of arrays, and takes as long.
HEAD_BYTES = {"cpu": 2**25}


def choose_lowering(model: ConfigDict, platform: str) -> None:
    """Replaces 0 in `head_group`, `head_bytes` and, where the backbone has them, `lanes` by what is
    best on `platform`."""
    if model.get("lanes") == 0:
        model.lanes = LANES.get(platform, 1)
    if not model.get("head_group"):  # runs of earlier versions lack it
        model.head_group = HEAD_GROUP.get(platform, Specialists.group)
    if not model.get("head_bytes"):
        alone = jax.device_count() == 1
        model.head_bytes = HEAD_BYTES.get(platform, IN_ONE) if alone else IN_ONE


def stride(config: ConfigDict) -> int:
    """What the sides of slices must divide by."""
    return backbone(config).stride(config.model)


def depth_stride(config: ConfigDict) -> int:
    """What the numbers of slices of volumes must divide by; 1 of a backbone for slices."""
    return backbone(config).depth_stride(config.model) if sees_volumes(config) else 1


def poolings(config: ConfigDict) -> int:
    """How often a backbone for volumes pools them; 0 of one for slices."""
    return backbone(config).levels(config.model) - 1 if sees_volumes(config) else 0


def sees_volumes(config: ConfigDict) -> bool:
    """Whether the backbone is for volumes [B, D, H, W, C]: then it has a `depth_stride`."""
    return hasattr(backbone(config), "depth_stride")


def check(config: ConfigDict) -> None:
    """Raises UserError where an option of `config.model` has a value that can not be, or the
    backbone is not for what training sees, slices or volumes."""
    module, name, depth = backbone(config), config.model.name, config.data.depth
    if sees_volumes(config) != bool(depth):
        sees = "volumes, so it must be above 0" if sees_volumes(config) else "slices: it must be 0"
        raise UserError(f"data.depth={depth}: {name} sees {sees}; model=unet3d sees volumes")
    if unknown := _own(config.model).keys() - module.Backbone.__dataclass_fields__.keys():
        raise UserError(
            f"{name} has no option model.{min(unknown)}; a backbone is chosen by the argument of "
            f"the config file, --config FILE.py:model={name}"
        )
    module.check(config.model)
    for name, known in CHOICES.items():
        check_choice(f"model.{name}", config.model[name], known)


def _own(model):
    """The options of the backbone."""
    return {k: v for k, v in model.items() if k not in SHARED}


def backbone(config: ConfigDict) -> ModuleType:
    """The module of `config.model.name`; docs/adding.md says what it has."""
    return load_by_name("cgs_jax.models", config.model.name, "model")
