"""VerSemi: a network that is asked for one class at a time (Zeng et al., 2311.11686).

A task is a class of `config.data.classes`: the classes of several data sets, or of one ("VerSemi,
single data set"). The prompt of a class has a binary answer; one prompt more, of the synthetic
task, asks for the foreground of all classes together. With F(x, k) for the probability under prompt
k, # for the synthetic task, D for Dice loss, and boxes of a labelled image b in another one, a, or
of a in an unlabelled one (mixU):

    L = D(F(a, k_a), y) + CE(F(a, k_a), y)        the class k_a that is drawn for the image
      + D(F(mix, #), y_mix)                       'syn': y_mix is the foreground of any class
      + (D(F(mix, k_a), y) + D(F(mix, k_b), y)) / 2                         'aux'
      + lambda (D(F(mixU, #), max_k F(mixU, k))   'agg': agreement with all classes together
              + D(F(mixU, #), y_a))               'cons': in the box

Certain, from abstract and released code: prompts, the synthetic task and its target, the terms, no
weights. Inferred: all terms at once (the code trains 'aux' in a first stage, 'agg' and 'cons' in a
second one), and the maximum as a teacher that does not learn (`detach_aggregate`; in the code it
does). What the paper says of these is not known.

Chosen here: tasks are classes, drawn uniformly among those annotated, absent ones included; the
neighbour in the batch stands for the other half of the code's batch; each image has a box of its
own. Drawn classes have a Dice loss each, and the mean of these counts, or small organs would not
count beside large ones (`pooled_dice` has one for all, as the code). A class that is nowhere in the
batch has none, see `dice_loss`. An image of the code has one class, so 'aux' takes the class of one
half as absent from the half of another task. Here y is where the label of either image has the
class: that is the same where it is not annotated, and right where it is.

A target is wrong where an organ is seen but not annotated. In a partly annotated image, labelled
background does not count for the prompt of an organ that its data set has and the image is not
annotated for, nor, where that prompt rather says organ than not, for the synthetic task. Organs of
other data sets count as absent, as in the code, but for where their prompts are surer than `doubt`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cgs_jax.methods import augment, base, batches
from cgs_jax.models.prompted import merge
from cgs_jax.runtime.errors import UserError

TERMS = ("syn", "aux", "agg", "cons")
DICE_EPS = 1e-5


class Asked(NamedTuple):
    """The student on labelled pixels, and what its prompts are asked there."""

    labelled: base.Labelled
    tasks: tuple[jax.Array, ...] = ()  # [B] each: a class of each image, counted from 0
    doubt: jax.Array | None = None  # [B, *S, K], True where a class seems to hide; None: nowhere
    # [B, *S, K], S may be 1s: classes of the data set that are not annotated there
    unmarked: jax.Array | None = None


class Method(base.Method):
    """The student predicts, by the merged answers of its prompts.

    CGS over it adds specialists, and labels that the student makes of the unlabelled part of the
    mixed images itself.
    """

    mixes = "labelled"
    heads = {"prompts": True}

    def __init__(self, config, specialists=False):
        super().__init__(config, specialists)
        options = config.method
        base.check_terms(options, TERMS)
        for name in ("box", "box_unlabelled"):
            sides = options[name]
            if not base.is_range(sides) or sides[0] <= 0 or sides[1] > 1:
                raise UserError(f"method.{name}={sides}: two shares of a side, smaller one first")

    def views(self, batch, key):
        """As the base class; with each labelled image's 'task' [B], one of its annotated classes
        counted from 0, and the boxes 'keep' [B, *S] of either stream, False inside."""
        k_base, k_task, k_labelled, k_unlabelled = jax.random.split(key, 4)
        options, views = self.config.method, super().views(batch, k_base)
        labelled, unlabelled = views["labelled"], views["unlabelled"]
        shape = labelled["label"].shape
        odds = jnp.zeros((shape[0], self.num_targets))
        if "annotated" in labelled:
            marked = jnp.any(labelled["annotated"], tuple(range(1, len(shape))))
            odds = jnp.where(marked, odds, -jnp.inf)
        labelled["task"] = jax.random.categorical(k_task, odds)
        labelled["keep"] = boxes(k_labelled, shape, options.box)
        shape = unlabelled["weak"].shape[:-1]
        unlabelled["keep"] = boxes(k_unlabelled, shape, options.box_unlabelled)
        return views

    def passes(self, params, state, views, key):
        """One pass over labelled images, their mixes, and unlabelled images with labelled boxes."""
        truth, unlabelled = views["labelled"], views["unlabelled"]
        image, task, annotated = truth["image"], truth["task"], truth.get("annotated")
        weak, outside = unlabelled["weak"], unlabelled["keep"]
        mixed = batches.cutmix(truth["keep"], image, batches.rolled(image))
        boxed = batches.cutmix(outside, weak, _repeated(image, len(weak)))
        both, boxed, model_state = self.student(
            params, state.model_state, batches.join(image, mixed), boxed, key
        )
        plain, mixed = batches.split(both, len(image))
        hidden, unmarked = None, None
        if annotated is not None:
            unmarked = truth.get("member", True) & ~annotated
            least = jnp.where(unmarked, 0.5, self.config.method.doubt)
            hidden = doubt(plain.prompts, truth["label"], annotated, least)
            hidden |= ~jnp.any(annotated, -1, keepdims=True)
        known = truth["label"], hidden, unmarked
        label_of_mix, *hidden_in_mix = batches.cutmix(truth["keep"], known, batches.rolled(known))
        label_of_box, hidden_in_box, _ = _repeated(known, len(weak))
        asked = [
            Asked(base.labelled(plain, views), (task,)),
            Asked(base.Labelled(mixed, label_of_mix), (task, batches.rolled(task)), *hidden_in_mix),
            Asked(base.Labelled(boxed, label_of_box, ~outside), doubt=hidden_in_box),
        ]
        pair = base.Pair(boxed, jax.lax.stop_gradient(boxed), outside)
        return base.Passes(asked, [pair], model_state, state.extra)

    def generalist_probs(self, outputs, members):
        """What is not a member is not asked for, so it takes nothing from the background."""
        return jnp.exp(merge(outputs.prompts, members))

    def objective(self, passes, step):
        options, (plain, mixed, boxed) = self.config.method, passes.labelled
        terms, unsupervised = task_loss(plain, options.pooled_dice), {}
        if self.specialists:
            heads = base.supervised_loss(plain.labelled)
            terms |= {name: x for name, x in heads.items() if name.startswith("sup/specialists")}
        if "syn" in options.terms:
            terms["sup/synthetic_dice"] = synthetic_loss(mixed)
        if "aux" in options.terms:
            terms["sup/auxiliary_dice"] = auxiliary_loss(mixed, options.pooled_dice)
        if "agg" in options.terms:
            prompts, detach = boxed.labelled.student.prompts, options.detach_aggregate
            unsupervised["unsup/aggregate_dice"] = aggregate_loss(prompts, detach)
        if "cons" in options.terms:
            unsupervised["unsup/box_dice"] = synthetic_loss(boxed)
        sup, unsup = (sum(x.values(), jnp.zeros(())) for x in (terms, unsupervised))
        weight = self.weight(step)
        metrics = {"loss": sup + weight * unsup, "sup": sup, "unsup": unsup, "lambda": weight}
        if mixed.doubt is not None:
            metrics["cover/certain"] = jnp.mean(~jnp.any(mixed.doubt, -1))
        return metrics["loss"], metrics | terms | unsupervised


def task_loss(asked: Asked, pooled: bool) -> base.Terms:
    """L_sup: cross-entropy, a mean over the pixels, and Dice of the drawn class of each image."""
    student, label, _, annotated = asked.labelled
    (task,) = asked.tasks
    odds, target = chosen(log_odds(student.prompts), task), is_class(label, task)
    of_pixels, where = jax.nn.log_sigmoid(jnp.where(target, odds, -odds)), None
    if annotated is not None:  # the class is, in this image, but pixels may be left out
        where = chosen(annotated, task) > 0
        of_pixels = jnp.where(where, of_pixels, 0)
    count = student.prompts.shape[-2] - 1
    groups = None if pooled else jax.nn.one_hot(task, count)
    dice = dice_loss(odds, target, where, groups)
    return {"sup/task_ce": -jnp.mean(of_pixels), "sup/task_dice": dice}


def synthetic_loss(asked: Asked) -> jax.Array:
    """L_syn, and L_cons where pixels are left out: Dice of the synthetic task."""
    student, label, where, _ = asked.labelled
    if asked.doubt is not None:
        certain = ~jnp.any(asked.doubt, -1)
        where = certain if where is None else where & certain
    return dice_loss(log_odds(student.prompts)[..., -1], label > 0, where)


def auxiliary_loss(asked: Asked, pooled: bool) -> jax.Array:
    """L_aux: Dice of the classes drawn for both images of a mix, the mean of the two."""
    student, label, *_ = asked.labelled
    odds, total, hidden = log_odds(student.prompts), 0, None
    if asked.doubt is not None:
        hidden = asked.doubt | (asked.unmarked & (label == 0)[..., None])
    for task in asked.tasks:
        where = None if hidden is None else chosen(hidden, task) == 0
        groups = None if pooled else jax.nn.one_hot(task, odds.shape[-1] - 1)
        total += dice_loss(chosen(odds, task), is_class(label, task), where, groups)
    return total / len(asked.tasks)


def aggregate_loss(prompts: jax.Array, detach: bool) -> jax.Array:
    """L_agg: Dice of the synthetic task against the surest of the classes at each pixel, of
    logits [B, *S, K + 1, 2]. `detach`: that teaches only."""
    odds = log_odds(prompts)
    aggregate = jax.nn.sigmoid(jnp.max(odds[..., :-1], -1))
    return dice_loss(odds[..., -1], jax.lax.stop_gradient(aggregate) if detach else aggregate)


def dice_loss(
    odds: jax.Array,
    target: jax.Array,
    where: jax.Array | None = None,
    groups: jax.Array | None = None,
) -> jax.Array:
    """1 - (2 S(p y) + e) / (S(p^2) + S(y^2) + e), e = 1e-5, with sums S over the whole batch of the
    foreground [B, *S] alone, where `where` is true; the target y may be soft.

    `groups` [B, K], one-hot: sums over the images of each group, and the mean over the groups.

    A target without any foreground counts nowhere and leaves 0. Its loss would be 1 until all p are
    next to nothing, and fall to 0 there: the surer the network is that there is no organ, the more
    this outweighs the classes that are there, until it finds none ever again. That a class is
    absent is for cross-entropy to teach.
    """
    probs, target = jax.nn.sigmoid(odds), target.astype(jnp.float32)
    if where is not None:
        probs, target = (jnp.where(where, x, 0) for x in (probs, target))
    if groups is None:
        groups = jnp.ones((len(probs), 1))
    of_images = (probs * target, probs * probs, target * target)
    # No matrix product: on TPUs that would round the sums to 8 bits.
    sums = (jnp.sum(x.reshape(len(x), -1), 1)[:, None] * groups for x in of_images)
    both, guess, truth = (jnp.sum(of_groups, 0) for of_groups in sums)
    losses = 1 - (2 * both + DICE_EPS) / (guess + truth + DICE_EPS)
    there = truth > 0
    return jnp.sum(jnp.where(there, losses, 0)) / jnp.maximum(jnp.sum(there), 1)


def doubt(
    prompts: jax.Array, label: jax.Array, annotated: jax.Array, threshold: jax.Array | float
) -> jax.Array:
    """Where a class that is not annotated may hide in the labelled background: [B, *S, K].

    Args:
      prompts: logits [B, *S, K + 1, 2] of the same images.
      label: [B, *S].
      annotated: [B, *S, K], S may be 1s.
      threshold: how sure its prompt must be of the class; one for all, or as `annotated`.
    """
    sure = jax.nn.sigmoid(log_odds(prompts)[..., :-1]) > threshold
    return sure & ~annotated & (label == 0)[..., None]


def log_odds(prompts: jax.Array) -> jax.Array:
    """Logits [..., 2] -> those of the foreground's probability [...], as a sigmoid takes them."""
    prompts = prompts.astype(jnp.float32)
    return prompts[..., 1] - prompts[..., 0]


def chosen(answers: jax.Array, task: jax.Array) -> jax.Array:
    """Of each image's answers [B, *S, prompts] those to its `task` [B]: [B, *S]."""
    tasks = jnp.expand_dims(task, range(1, answers.ndim))
    return jnp.sum(jnp.where(tasks == jnp.arange(answers.shape[-1]), answers, 0), -1)


def is_class(label: jax.Array, task: jax.Array) -> jax.Array:
    """Where `label` [B, *S] is the class of each image's `task` [B], counted from 0."""
    return label == jnp.expand_dims(task, range(1, label.ndim)) + 1


def boxes(key: jax.Array, shape: tuple[int, ...], sides: tuple[float, float]) -> jax.Array:
    """One box an image: of `shape` [B, *S], False inside.

    It has one share of every side of the image, uniform between `sides`, rounded down to pixels;
    its position is uniform inside the image.
    """
    sizes = jnp.array(shape[1:])

    def one(key):
        k_side, k_corner = jax.random.split(key)
        share = jax.random.uniform(k_side, minval=sides[0], maxval=sides[1])
        side = jnp.floor(share * sizes + 1e-3).astype(jnp.int32)  # 2/3 of 96 is 64
        corner = jax.random.randint(k_corner, side.shape, 0, sizes - side + 1)
        return augment.box_keep(jnp.concatenate([corner, side]), shape[1:])

    return jax.vmap(one)(jax.random.split(key, shape[0]))


def _repeated(tree, count):
    """The first `count` images of endless repetitions; as many as there are stay where they are."""
    times = lambda x: math.ceil(count / len(x))  # noqa: E731
    return jax.tree.map(lambda x: jnp.concatenate([x] * times(x))[:count], tree)
