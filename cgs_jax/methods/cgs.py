"""CGS: collaborative generalist and specialists (Wang et al., IEEE TMI 2025, arXiv 2504.00862).

A teacher (EMA of the student) labels the weak view of unlabelled images twice: by its generalist
where that is confident, and by its specialists where inter-head error detection (IHED) finds no
contradiction. Both labels, and where they agree the consensus, teach both kinds of heads of the
student on the CutMixed strong view.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cgs_jax import augment, losses
from cgs_jax import pseudo_labels as pl
from cgs_jax.errors import UserError
from cgs_jax.methods import base
from cgs_jax.models import Outputs
from cgs_jax.train_state import TrainState


class Method(base.Method):
    """CGS by either of two iteration plans, `config.method.plan`.

    'full' runs what the authors' code runs: the student on weak and strong views of all images in
    two passes, the teacher on them and on a second batch of CutMix partners.
    'lean' runs what enters a loss: the student on [labelled weak, unlabelled strong] in one pass,
    the teacher on the unlabelled weak views, whose rolled batch serves as CutMix partners.
    They differ in what batch norm sees, and by a factor of two in work.
    """

    specialists = True

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        plan = config.method.plan
        if plan not in ("lean", "full"):
            raise UserError(f"unknown --config.method.plan {plan!r}; there are: full, lean")
        self.draws = 2 if plan == "full" else 1

    def init(self, key, image):
        params, model_state, _ = super().init(key, image)
        teacher = {"params": params, "model_state": model_state}
        # A copy: state buffers are donated, and one buffer can not be donated twice.
        return params, model_state, jax.tree.map(jnp.copy, teacher)

    def views(self, batch, key):
        """As the base class, and 'keep', the CutMix boxes; the full plan adds a strong view of the
        labelled images and the second half of the batch as 'partner', with views of its own."""
        k_own, k_partner, k_strong, k_keep = jax.random.split(key, 4)
        if self.config.method.plan == "lean":
            views = super().views(batch, k_own)
        else:
            views = super().views(jax.tree.map(lambda x: x[: len(x) // 2], batch), k_own)
            partner = jax.tree.map(lambda x: x[len(x) // 2 :], batch)
            views["partner"] = super().views(partner, k_partner)
            labelled = views["labelled"]
            labelled["strong"] = augment.strong(k_strong, labelled["image"], self.config.augment)
        views["keep"] = augment.cutmix_keep(k_keep, *views["unlabelled"]["weak"].shape[:2])
        return views

    def loss(self, params, state, views, key):
        step = self._lean if self.config.method.plan == "lean" else self._full
        labelled, mixed, pseudo, model_state, teacher_state = step(params, state, views, key)

        terms = base.supervised_loss(labelled, views["labelled"]["label"])
        supervised = sum(terms.values())
        unsupervised_terms, coverage = consistency_losses(mixed, pseudo)
        unsupervised = sum(unsupervised_terms.values())
        weight = losses.gaussian_ramp(
            state.step, self.config.total_steps, self.config.method.lambda_max
        )
        loss = supervised + weight * unsupervised
        metrics = {"loss": loss, "sup": supervised, "unsup": unsupervised, "lambda": weight}
        extra = {"params": state.extra["params"], "model_state": teacher_state}
        return loss, (model_state, extra, metrics | terms | unsupervised_terms | coverage)

    def _lean(self, params, state, views, key):
        k_student, k_teacher = jax.random.split(key)
        image, unlabelled = views["labelled"]["image"], views["unlabelled"]
        teacher, teacher_state = self.forward(
            *self.inference_variables(state), unlabelled["weak"], k_teacher
        )
        own = pl.from_teacher(teacher, self.config.method.tau)
        partner = jax.tree.map(lambda x: jnp.roll(x, 1, axis=-3), own)
        strong = unlabelled["strong"]
        strong = cutmix(views["keep"], strong, jnp.roll(strong, 1, axis=0))
        images = _join(image, strong)
        student, model_state = self.forward(params, state.model_state, images, k_student)
        labelled, mixed = _split(student, len(image))
        pseudo = mix_labels(views["keep"], own, partner)
        return labelled, mixed, pseudo, model_state, teacher_state

    def _full(self, params, state, views, key):
        k_weak, k_strong, k_own, k_partner = jax.random.split(key, 4)
        keep, partner_views = views["keep"], views["partner"]
        count = len(views["labelled"]["image"])

        teacher_params, teacher_state = self.inference_variables(state)
        partner, teacher_state = self.forward(
            teacher_params, teacher_state, _all_weak(partner_views), k_partner
        )
        own, teacher_state = self.forward(teacher_params, teacher_state, _all_weak(views), k_own)
        own, partner = (
            pl.from_teacher(_split(x, count)[1], self.config.method.tau) for x in (own, partner)
        )

        weak, model_state = self.forward(params, state.model_state, _all_weak(views), k_weak)
        strong, strong_partner = (v["unlabelled"]["strong"] for v in (views, partner_views))
        strong = cutmix(keep, strong, strong_partner)
        strong = _join(views["labelled"]["strong"], strong)
        strong, model_state = self.forward(params, model_state, strong, k_strong)
        pseudo = mix_labels(keep, own, partner)
        labelled, mixed = _split(weak, count)[0], _split(strong, count)[1]
        return labelled, mixed, pseudo, model_state, teacher_state

    def after_update(self, state: TrainState) -> TrainState:
        """Moves the teacher: EMA of the parameters, which follows closely at first."""
        decay = jnp.minimum(1 - 1 / state.step, self.config.method.ema_decay)
        teacher = optax.incremental_update(state.params, state.extra["params"], 1 - decay)
        return state.replace(extra=state.extra | {"params": teacher})

    def inference_variables(self, state: TrainState) -> tuple[Any, Any]:
        return state.extra["params"], state.extra["model_state"]


def consistency_losses(
    student: Outputs, pseudo: pl.PseudoLabels
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The six unsupervised terms L_G and L_S, each as CE and Dice, and what the masks let through.

    G and S are the student's generalist and specialists, _from_g, _from_s and _from_e what teaches
    them: the teacher's generalist, its specialists, or the consensus of both.

    Returns:
      Terms such as 'unsup/G_from_s_ce' (S: mean over the heads), and shares of pixels 'cover/...'.
    """
    num_targets = student.specialists.shape[0]
    agree = pseudo.generalist == pseudo.specialists
    from_generalist = pl.relabel(pseudo.generalist, num_targets)
    sources = {  # label for the generalist, labels for the specialists, mask of both
        "g": (pseudo.generalist, from_generalist, pseudo.confident),
        "s": (pseudo.specialists, pseudo.votes, pseudo.consistent),
        "e": (pseudo.generalist, from_generalist, agree),
    }
    terms, coverage = {}, {}
    for name, (label, head_labels, mask) in sources.items():
        ce, dice = losses.segmentation_loss(student.generalist, label, mask)
        terms |= {f"unsup/G_from_{name}_ce": ce, f"unsup/G_from_{name}_dice": dice}
        head_loss = jax.vmap(losses.segmentation_loss, in_axes=(0, 0, None))
        ce, dice = head_loss(student.specialists, head_labels, mask)
        terms |= {f"unsup/S_from_{name}_ce": jnp.mean(ce)}
        terms |= {f"unsup/S_from_{name}_dice": jnp.mean(dice)}
        coverage[f"cover/{name}"] = jnp.mean(mask)
    return terms, coverage


def cutmix(keep: jax.Array, own: jax.Array, partner: jax.Array) -> jax.Array:
    """Images [B, H, W, 1]: `own` where `keep` [B, H, W] is true, else `partner`."""
    return jnp.where(keep[..., None], own, partner)


def mix_labels(keep: jax.Array, own: pl.PseudoLabels, partner: pl.PseudoLabels) -> pl.PseudoLabels:
    """The same for all labels and masks at once."""
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), own, partner)


def _all_weak(views):
    return _join(views["labelled"]["image"], views["unlabelled"]["weak"])


def _join(labelled: jax.Array, unlabelled: jax.Array) -> jax.Array:
    """Both batches as one, dealt in turn: so each device's rows of both stay on that device."""
    groups = math.gcd(len(labelled), len(unlabelled))
    parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (labelled, unlabelled)]
    return jnp.concatenate(parts, 1).reshape(-1, *labelled.shape[1:])


def _split(outputs: Outputs, labelled: int) -> tuple[Outputs, Outputs]:
    """The outputs of `_join`ed batches, apart again."""
    total = len(outputs.generalist)
    groups = math.gcd(labelled, total - labelled)

    def part(x, which):
        dealt = x.reshape(*x.shape[:-4], groups, -1, *x.shape[-3:])
        return dealt[..., which, :, :, :].reshape(*x.shape[:-4], -1, *x.shape[-3:])

    first, rest = slice(labelled // groups), slice(labelled // groups, None)
    return Outputs(*(part(x, first) for x in outputs)), Outputs(*(part(x, rest) for x in outputs))
