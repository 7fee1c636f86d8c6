"""CGS: collaborative generalist and specialists (Wang et al., IEEE TMI 2025, arXiv 2504.00862).

A teacher (EMA of the student) labels the weak view of unlabelled images twice: by its generalist
where that is confident, and by its specialists where inter-head error detection (IHED) finds no
contradiction. Both labels, and where they agree the consensus, teach both kinds of heads of the
student on the CutMixed strong view.

`Method` is CGS by its own recipe; `Over` lays specialists and their terms over another method.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cgs_jax.methods import augment, base, batches, losses, pseudo_labels
from cgs_jax.methods.pseudo_labels import PseudoLabels
from cgs_jax.models.network import Outputs
from cgs_jax.runtime.errors import UserError, check_choice

TERMS = ("G_from_g", "G_from_s", "G_from_e", "S_from_g", "S_from_s", "S_from_e")


class Method(base.WithTeacher):
    """The passes of CGS by either of two plans, `config.method.plan`. The teacher predicts.

    'full' runs what the authors' code runs: the student on weak and strong views of all images in
    two passes, the teacher on them and on a second batch of CutMix partners.
    'lean' runs what enters a loss: the student on [labelled weak, unlabelled strong] in one pass,
    the teacher on the unlabelled weak views, whose rolled batch serves as CutMix partners.
    They differ in what batch norm sees, and by a factor of two in work.

    Without specialists (`config.method.specialists` False) the generalist's own labels are all that
    is left, the term 'G_from_g': the control that tells what teacher and CutMix do alone.
    """

    predicts = "teacher"

    def __init__(self, config: ConfigDict, specialists: bool = True):
        super().__init__(config, specialists and config.method.specialists)
        options = config.method
        _check(options)
        if not self.specialists and tuple(options.terms) != ("G_from_g",):
            raise UserError("method.specialists=False goes with method.terms=('G_from_g',)")
        check_choice("--config.method.plan", options.plan, ("full", "lean"))
        full = options.plan == "full"
        self.draws = 2 if full else 1
        self.mixes = "" if full else "unlabelled"
        if options.copy_paste and (full or config.batch.labelled != config.batch.unlabelled):
            raise UserError(
                "method.copy_paste is for plan=lean and as many labelled as unlabelled slices"
            )

    def views(self, batch, key):
        """As the base class, and 'keep', the CutMix boxes; the full plan adds a strong view of the
        labelled images and the second half of the batch as 'partner', with views of its own;
        copy-paste that strong view and 'unpasted' [B], False where it fills the box."""
        k_own, k_partner, k_strong, k_keep, k_paste = jax.random.split(key, 5)
        options = self.config.method
        if options.plan == "lean":
            views = super().views(batch, k_own)
        else:
            views = super().views(jax.tree.map(lambda x: x[: len(x) // 2], batch), k_own)
            partner = jax.tree.map(lambda x: x[len(x) // 2 :], batch)
            views["partner"] = super().views(partner, k_partner)
        labelled = views["labelled"]
        if options.plan == "full" or options.copy_paste:
            labelled["strong"] = augment.strong(k_strong, labelled["image"], self.config.augment)
        if options.copy_paste:
            shape = (len(labelled["image"]),)
            views["unpasted"] = ~jax.random.bernoulli(k_paste, options.copy_paste, shape)
        views["keep"] = augment.cutmix_keep(
            k_keep, views["unlabelled"]["weak"].shape[:-1], options.cutmix
        )
        return views

    def passes(self, params, state, views, key):
        plan = self._lean if self.config.method.plan == "lean" else self._full
        labelled, pair, model_state, extra = plan(params, state, views, key)
        return base.Passes([base.labelled(labelled, views)], [pair], model_state, extra)

    def unsupervised(self, pairs):
        return consistency(pairs, self.config.method)

    def _lean(self, params, state, views, key):
        k_student, k_teacher = jax.random.split(key)
        image, unlabelled = views["labelled"]["image"], views["unlabelled"]
        teacher, extra = self.teacher(state, unlabelled["weak"], k_teacher)
        own = unlabelled["strong"], pseudo_labels.from_teacher(teacher, self.config.method.tau)
        partner, keep, where = batches.rolled(own), views["keep"], None
        if self.config.method.copy_paste:
            truth = self._truth(base.labelled(None, views))
            pasted = views["labelled"]["strong"], truth
            partner = batches.cutmix(views["unpasted"], partner, pasted)
            # No term counts where annotation hides organs in what is pasted.
            unpasted = jnp.expand_dims(views["unpasted"], range(1, keep.ndim))
            where = keep | unpasted | truth.confident
        strong, pseudo = batches.cutmix(keep, own, partner)
        labelled, mixed, model_state = self.student(
            params, state.model_state, image, strong, k_student
        )
        return labelled, base.Pair(mixed, pseudo, where), model_state, extra

    def _truth(self, labelled):
        label, known = labelled.label, jnp.ones_like(labelled.label, bool)
        if labelled.annotated is not None:  # else what is labelled background may be an organ
            known = (label > 0) | jnp.all(labelled.annotated, -1)
        if not self.specialists:
            return PseudoLabels(label, known)
        classes = self.config.model.head_classes
        votes = pseudo_labels.relabel(label, self.num_targets, classes)
        return PseudoLabels(label, known, label, votes, known)  # a teacher without error

    def _full(self, params, state, views, key):
        k_weak, k_strong, k_own, k_partner = jax.random.split(key, 4)
        keep, partner_views = views["keep"], views["partner"]
        count, tau = len(views["labelled"]["image"]), self.config.method.tau

        partner, extra = self.teacher(state, _all_weak(partner_views), k_partner)
        own, extra = self.teacher(state.replace(extra=extra), _all_weak(views), k_own)
        own, partner = (
            pseudo_labels.from_teacher(batches.split(x, count)[1], tau) for x in (own, partner)
        )

        weak, model_state = self.forward(params, state.model_state, _all_weak(views), k_weak)
        strong, strong_partner = (v["unlabelled"]["strong"] for v in (views, partner_views))
        strong, pseudo = batches.cutmix(keep, (strong, own), (strong_partner, partner))
        _, mixed, model_state = self.student(
            params, model_state, views["labelled"]["strong"], strong, k_strong
        )
        labelled = batches.split(weak, count)[0]
        return labelled, base.Pair(mixed, pseudo), model_state, extra


class Over:
    """CGS over another method, which trains as it does alone but with specialists, and keeps its
    threshold, weight and ramp; the terms of CGS come on top, with those of `config.cgs`.

    What is not defined here is the other method's, such as who predicts.
    """

    def __init__(self, method: base.Method):
        if isinstance(method, Method) or not method.unlabelled:
            name = method.config.method.name
            raise UserError(f"base={name}: CGS lies over other methods with unlabelled images only")
        if type(method).loss is not base.Method.loss:
            raise TypeError("CGS does not call a method's own loss: override objective instead")
        _check(method.config.cgs, "cgs")
        self.method = method

    def __getattr__(self, name):
        return getattr(self.method, name)

    def loss(self, params, state, views, key):
        """The other method's, and what CGS adds; its metrics are 'cgs/...'."""
        options, passes = self.config.cgs, self.passes(params, state, views, key)
        if not passes.pairs:
            raise TypeError("CGS lies over methods whose passes have pairs")
        loss, metrics = self.method.objective(passes, state.step)
        terms, coverage = consistency(passes.pairs, options)
        added = sum(terms.values())
        weight = losses.gaussian_ramp(state.step, self.config.total_steps, options.lambda_max)
        more = {"unsup": added, "lambda": weight, **terms}
        metrics |= {"loss": loss + weight * added, **coverage}
        metrics |= {f"cgs/{name.removeprefix('unsup/')}": value for name, value in more.items()}
        return metrics["loss"], (passes.model_state, passes.extra, metrics)


def consistency(pairs: Sequence[base.Pair], options: ConfigDict) -> tuple[base.Terms, base.Terms]:
    """Sums over the pairs of `consistency_losses`; a pair counts by its share."""
    terms, coverage = {}, {}
    shares = sum(pair.share for pair in pairs)
    for student, teacher, where, share in pairs:
        pseudo = teacher
        if not isinstance(teacher, PseudoLabels):
            pseudo = pseudo_labels.from_teacher(teacher, options.tau)
        if pseudo.consistent is not None and not options.ihed:
            pseudo = pseudo._replace(consistent=jnp.ones_like(pseudo.consistent))
        more, covered = consistency_losses(student, pseudo, where, options.terms)
        more = {name: share * term for name, term in more.items()}
        covered = {name: share / shares * part for name, part in covered.items()}
        terms, coverage = base.add([terms, more]), base.add([coverage, covered])
    return terms, coverage


def consistency_losses(
    student: Outputs,
    pseudo: PseudoLabels,
    where: jax.Array | None = None,
    names: Sequence[str] = TERMS,
) -> tuple[base.Terms, base.Terms]:
    """The six unsupervised terms L_G and L_S, each as CE and Dice, and what the masks let through.

    G and S are the student's generalist and specialists, _from_g, _from_s and _from_e what teaches
    them: the teacher's generalist, its specialists, or the consensus of both.

    `where` [B, *S] leaves pixels out; `names` chooses among the terms.

    Returns:
      Terms such as 'unsup/G_from_s_ce' (S: mean over the heads), and shares of pixels 'cover/...'.
    """
    # label for the generalist, labels for the specialists, mask of both
    sources = {"g": (pseudo.generalist, None, pseudo.confident)}
    if student.specialists is not None:
        agree = pseudo.generalist == pseudo.specialists
        from_generalist = pseudo_labels.relabel(pseudo.generalist, *student.heads)
        sources = {
            "g": (pseudo.generalist, from_generalist, pseudo.confident),
            "s": (pseudo.specialists, pseudo.votes, pseudo.consistent),
            "e": (pseudo.generalist, from_generalist, agree),
        }
    terms, coverage = {}, {}
    for name, (label, head_labels, mask) in sources.items():
        mask = mask if where is None else mask & where
        if f"G_from_{name}" in names:
            ce, dice = losses.segmentation_loss(student.generalist, label, mask)
            terms |= {f"unsup/G_from_{name}_ce": ce, f"unsup/G_from_{name}_dice": dice}
        if f"S_from_{name}" in names:
            ce, dice = base.heads_loss(student.specialists, head_labels, mask)
            terms |= {f"unsup/S_from_{name}_ce": ce, f"unsup/S_from_{name}_dice": dice}
        coverage[f"cover/{name}"] = jnp.mean(mask)
    return terms, coverage


def _check(options, section="method"):
    base.check_terms(options, TERMS, section)
    if not options.terms:
        raise UserError(f"--config.{section}.terms is empty; there are: {', '.join(TERMS)}")


def _all_weak(views):
    return batches.join(views["labelled"]["image"], views["unlabelled"]["weak"])
