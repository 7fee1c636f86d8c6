"""What a training method is. One file a method; `load_by_name` finds it.

A method says which passes a step makes (`passes`), and what its student loses on unlabelled pixels
against what teaches it there (`unsupervised`). The rest is shared. CGS can be laid over any method
with unlabelled images (`cgs.Over`), since all that it needs is in the passes.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cgs_jax.data import tasks
from cgs_jax.data.streams import Stream
from cgs_jax.data.volume import NO_LABEL
from cgs_jax.methods import augment, batches, losses, pseudo_labels
from cgs_jax.models.network import Outputs, build
from cgs_jax.runtime.errors import UserError, check_choice
from cgs_jax.training.train_state import TrainState

Batch = dict[str, Any]
Terms = dict[str, jax.Array]  # by name, scalars


class Labelled(NamedTuple):
    """The student on labelled pixels."""

    student: Outputs
    label: jax.Array  # [B, *S]
    where: jax.Array | None = None  # [B, *S], True where it counts; None: everywhere
    # [B, *S, K], S may be 1s: organs that are annotated there; None: all are, everywhere
    annotated: jax.Array | None = None


class Pair(NamedTuple):
    """The student on unlabelled pixels, and what teaches it there; that carries no gradient."""

    student: Outputs
    teacher: Outputs | pseudo_labels.PseudoLabels
    where: jax.Array | None = None  # [B, *S], True where it counts; None: everywhere
    share: float = 1.0  # in the terms that CGS adds


class Passes(NamedTuple):
    """All forward passes of a step."""

    labelled: list[Labelled]
    pairs: list[Pair]
    model_state: Any  # after them
    extra: Any


class Method:
    """Base class: one network, weak and strong views, prediction by the student.

    A subclass defines `passes` and `unsupervised`, and overrides what it does otherwise. All
    methods are traced: they must be pure functions of their arguments.

    Attributes:
      unlabelled: whether batches hold unlabelled images.
      specialists: whether the network has specialist heads.
      draws: batches of `config.batch` that one step takes.
      has_teacher: whether a teacher could predict in place of the student.
      mixes: 'labelled' or 'unlabelled', where images of that stream are mixed with each other, if
        `config.method.cutmix`, where there is such a probability, is not 0.
      heads: further heads of the network, arguments of `network.build`.
      loads_heads: whether `config.model.weights` give heads, too, where they have any.
    """

    unlabelled = True
    draws = 1
    has_teacher = False
    mixes = ""
    heads: dict[str, bool] = {}
    loads_heads = True

    def __init__(self, config: ConfigDict, specialists: bool = False):
        """`specialists`: with them, though the method alone has none."""
        self.config, self.specialists = config, specialists
        self.network = build(config, self.specialists, **self.heads)
        self.num_targets = len(config.data.classes)
        steps_of(config, "ramp")  # complains of what is no share

    def streams(self) -> dict[str, Stream]:
        """What a step takes of the training data, by name; a batch holds these names."""
        found = {"labelled": Stream("labelled", True, self.config.batch.labelled * self.draws)}
        if self.unlabelled:
            count = self.config.batch.unlabelled * self.draws
            found["unlabelled"] = Stream("unlabelled", False, count)
        return found

    def init(self, key: jax.Array, image: jax.Array) -> tuple[Any, Any, Any]:
        """Returns (params, model_state, extra) for images shaped as `image` [1, H, W, C]."""
        variables = self.network.init(key, image, train=False)
        return variables["params"], {"batch_stats": variables["batch_stats"]}, {}

    def views(self, batch: Batch, key: jax.Array) -> Batch:
        """Augments a batch {'labelled': {'image', 'label'}, 'unlabelled': {'image'}}; 'aspect' [B]
        beside an image is height by width of the slices before they were made square.

        Returns {'labelled': {'image', 'label'}, 'unlabelled': {'weak', 'strong'}}, images
        [B, *S, C]; the strong view is the weak one, jittered. Where images are annotated for some
        organs only, 'annotated' [B, 1, 1, K] stands beside 'label', and 'member', those that its
        data set has; or [B, *S, K] where pixels may be left out: those are annotated for none.
        """
        k_labelled, k_weak, k_strong = jax.random.split(key, 3)
        options = self.config.augment
        truth = dict(batch["labelled"])
        moved = truth["image"], truth["label"], options, truth.pop("aspect", None)
        truth["image"], truth["label"] = augment.weak(k_labelled, *moved)
        if tasks.ignores(self.config.data):  # there no organ is annotated
            nothing = truth["label"] == NO_LABEL
            truth["annotated"] &= ~nothing[..., None]
            truth["label"] = jnp.where(nothing, 0, truth["label"])
        views = {"labelled": truth}
        if "unlabelled" in batch:
            image, aspect = (batch["unlabelled"].get(name) for name in ("image", "aspect"))
            weak, _ = augment.weak(k_weak, image, None, options, aspect)
            strong = augment.strong(k_strong, weak, options)
            views["unlabelled"] = {"weak": weak, "strong": strong}
        return views

    def passes(self, params: Any, state: TrainState, views: Batch, key: jax.Array) -> Passes:
        """Runs student and teachers on the views of one step."""
        raise NotImplementedError

    def unsupervised(self, pairs: list[Pair]) -> tuple[Terms, Terms]:
        """Terms 'unsup/...', whose sum is weighted, and shares of pixels 'cover/...'."""
        raise NotImplementedError

    def weight(self, step: jax.Array) -> jax.Array:
        """Weight of the unsupervised terms."""
        steps, maximum = steps_of(self.config, "ramp"), self.config.method.lambda_max
        return losses.gaussian_ramp(step, steps, maximum) if steps else jnp.float32(maximum)

    def loss(
        self, params: Any, state: TrainState, views: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Any, Terms]]:
        """Returns (loss, (model_state, extra, metrics)); differentiated by `params`."""
        passes = self.passes(params, state, views, key)
        loss, metrics = self.objective(passes, state.step)
        return loss, (passes.model_state, passes.extra, metrics)

    def objective(self, passes: Passes, step: jax.Array) -> tuple[jax.Array, Terms]:
        """The loss of all passes, 'loss', and its parts by name."""
        if self.config.data.partial and any(x.annotated is None for x in passes.labelled):
            raise TypeError("passes.labelled lacks what is annotated; see base.labelled")
        terms = add(map(supervised_loss, passes.labelled))
        supervised = sum(terms.values())
        metrics = {"loss": supervised, "sup": supervised, **terms}
        if passes.pairs:
            terms, coverage = self.unsupervised(passes.pairs)
            unsupervised = sum(terms.values())
            weight = self.weight(step)
            loss = supervised + weight * unsupervised
            metrics |= {"loss": loss, "unsup": unsupervised, "lambda": weight, **terms, **coverage}
        return metrics["loss"], metrics

    def after_update(self, state: TrainState) -> TrainState:
        """Called after the optimiser, e.g. to move a teacher; `state.step` counts this update."""
        return state

    def predict(
        self, state: TrainState, image: jax.Array, members: jax.Array | None = None
    ) -> jax.Array:
        """[B, *S, channels] -> class probabilities [M, B, *S, C] of the heads that decide, in
        evaluation mode. `members`, bool [K]: the organs that the images' data set has; there
        others have no probability. None: it has all."""
        params, model_state = self.inference_variables(state)
        outputs = self.network.apply({"params": params, **model_state}, image, train=False)
        heads = []
        if self.config.inference != "specialists":
            heads.append(self.generalist_probs(outputs, members))
        if self.config.inference != "generalist":
            merged = pseudo_labels.merge(pseudo_labels.specialist_probs(outputs))
            merged /= jnp.sum(merged, -1, keepdims=True)
            heads.append(pseudo_labels.within(merged, members))
        return jnp.stack(heads)

    def generalist_probs(self, outputs: Outputs, members: jax.Array | None) -> jax.Array:
        """Of all classes [B, *S, C], for images whose data set has the organs `members`."""
        probs = jax.nn.softmax(outputs.generalist.astype(jnp.float32))
        return pseudo_labels.within(probs, members)

    def inference_variables(self, state: TrainState) -> tuple[Any, Any]:
        """(params, model_state) that `predict` uses: the student's."""
        return state.params, state.model_state

    def with_inference_state(self, state: TrainState, model_state: Any) -> TrainState:
        """`state` in which `inference_variables` finds this `model_state`."""
        return state.replace(model_state=model_state)

    def statistics(self, params: Any, model_state: Any, image: jax.Array, key: jax.Array) -> Any:
        """`model_state` after a pass in training mode of what `inference_variables` gives."""
        return self.forward(params, model_state, image, key)[1]

    def labelling_variables(self, state: TrainState) -> tuple[Any, Any]:
        """(params, model_state) of who labels unlabelled images: the student."""
        return state.params, state.model_state

    def forward(
        self, params: Any, model_state: Any, image: jax.Array, key: jax.Array, **options: Any
    ) -> tuple[Outputs, Any]:
        """Forward pass in training mode: dropout on, batch statistics used and collected."""
        return self.network.apply(
            {"params": params, **model_state},
            image,
            train=True,
            **options,
            rngs={"dropout": key},
            mutable=list(model_state),
        )

    def student(
        self, params: Any, model_state: Any, labelled: jax.Array, unlabelled: jax.Array, key: Any
    ) -> tuple[Outputs, Outputs, Any]:
        """One pass over both: outputs of `labelled`, of `unlabelled`, and model_state."""
        outputs, model_state = self.forward(
            params, model_state, batches.join(labelled, unlabelled), key
        )
        return *batches.split(outputs, len(labelled)), model_state


class WithTeacher(Method):
    """A method with a teacher: an exponential moving average (EMA) of the student's parameters.

    With `config.method.teacher` 'train' it runs as the student does, with dropout and batch
    statistics of its own; with 'eval' without dropout, by an average of the student's statistics.

    Attributes:
      predicts: who does, where `config.predict_with` does not say.
    """

    has_teacher = True
    predicts = "student"

    def __init__(self, config, specialists=False):
        super().__init__(config, specialists)
        self._teacher_predicts = (config.predict_with or self.predicts) == "teacher"
        check_choice("--config.method.teacher", config.method.teacher, ("eval", "train"))

    def init(self, key, image):
        params, model_state, _ = super().init(key, image)
        teacher = {"params": params, "model_state": model_state}
        # A copy: state buffers are donated, and one buffer can not be donated twice.
        return params, model_state, jax.tree.map(jnp.copy, teacher)

    def after_update(self, state: TrainState) -> TrainState:
        """Moves the teacher; it follows closely at first."""
        decay = jnp.minimum(1 - 1 / state.step, self.config.method.ema_decay)
        own = {"params": state.params}
        if self.config.method.teacher == "eval":
            own["model_state"] = state.model_state
        before = {name: state.extra[name] for name in own}
        return state.replace(extra=state.extra | optax.incremental_update(own, before, 1 - decay))

    def labelling_variables(self, state):
        """The teacher's."""
        return state.extra["params"], state.extra["model_state"]

    def inference_variables(self, state):
        """Those of student or teacher."""
        if self._teacher_predicts:
            return self.labelling_variables(state)
        return super().inference_variables(state)

    def with_inference_state(self, state, model_state):
        if self._teacher_predicts:
            return state.replace(extra=state.extra | {"model_state": model_state})
        return super().with_inference_state(state, model_state)

    def teacher(self, state: TrainState, image: jax.Array, key: jax.Array) -> tuple[Outputs, Any]:
        """Its forward pass, and `extra` with the statistics that it leaves."""
        params, model_state = state.extra["params"], state.extra["model_state"]
        if self.config.method.teacher == "eval":
            return self.network.apply({"params": params, **model_state}, image), state.extra
        outputs, model_state = self.forward(params, model_state, image, key)
        return outputs, state.extra | {"model_state": model_state}


def steps_of(config: ConfigDict, field: str) -> int:
    """Steps that a share of `config.total_steps` makes up."""
    share = config.method[field]
    if not 0 <= share <= 1:
        raise UserError(f"method.{field}={share}: it is a share of total_steps, between 0 and 1")
    return round(share * config.total_steps)


def check_terms(options: ConfigDict, known: Sequence[str], section: str = "method") -> None:
    """Raises UserError where `options.terms`, of a `section` of the config, names another term than
    those `known`."""
    if wrong := set(options.terms) - set(known):
        raise UserError(
            f"unknown --config.{section}.terms {', '.join(sorted(map(str, wrong)))}; "
            f"there are: {', '.join(known)}"
        )


def is_range(value: Sequence[Any]) -> bool:
    """Whether `value` is two numbers, the smaller one first."""
    numbers = all(isinstance(number, int | float) for number in value)
    return numbers and len(value) == 2 and value[0] <= value[1]


def scales(outputs: Outputs) -> jax.Array:
    """Logits of all classes at all scales of the decoder, finest first: [B, *S, scales, C]."""
    return jnp.concatenate([outputs.generalist[..., None, :], outputs.pyramid], -2)


def add(terms: Iterable[Terms]) -> Terms:
    """Sums by name."""
    total: Terms = {}
    for some in terms:
        total |= {name: total.get(name, 0) + value for name, value in some.items()}
    return total


def heads_loss(
    groups: Sequence[jax.Array], labels: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """CE and Dice, means over K heads: their logits in groups, [B, *S, n, C] each, against labels
    [B, *S, K], where `where`, [B, *S] or of each head [B, *S, K], is true."""
    of_heads = where is not None and where.ndim == labels.ndim
    axes, of_groups, start = (0, 0, 0 if of_heads else None), [], 0
    for logits in groups:
        own = slice(start, start + logits.shape[-2])
        heads = jnp.moveaxis(logits, -2, 0), jnp.moveaxis(labels[..., own], -1, 0)  # planes
        mask = jnp.moveaxis(where[..., own], -1, 0) if of_heads else where
        of_groups.append(jax.vmap(losses.segmentation_loss, axes)(*heads, mask))
        start = own.stop
    ce, dice = (jnp.mean(jnp.concatenate(each)) for each in zip(*of_groups, strict=True))
    return ce, dice


def confident_loss(
    student: Outputs, teacher: Outputs, tau: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """CE and Dice of the generalist where the teacher's is surer than `tau`, and that share."""
    label, sure = pseudo_labels.confident(teacher.generalist, tau)
    ce, dice = losses.segmentation_loss(student.generalist, label, sure)
    return ce, dice, jnp.mean(sure)


def labelled(student: Outputs, views: Batch) -> Labelled:
    """The student on the labelled images of `views`."""
    truth = views["labelled"]
    return Labelled(student, truth["label"], annotated=truth.get("annotated"))


def supervised_loss(labelled: Labelled) -> Terms:
    """CE and Dice of the generalist, or the mean over the scales of a pyramid, and, where there are
    any, the mean over the specialists.

    Where an image is annotated for some organs only, the others count as background, and only the
    specialists of the annotated ones learn; to them, labelled background may be a remaining organ.
    Pixels for which no organ is annotated do not count.

    Returns the terms by name; L_sup is their sum.
    """
    outputs, label, where, annotated = labelled
    logits = outputs.generalist if outputs.pyramid is None else scales(outputs)
    if annotated is not None and annotated.shape[:-1] == label.shape:  # pixels may be left out
        known = jnp.any(annotated, -1)
        where = known if where is None else where & known
    if annotated is not None:
        each = annotated if outputs.pyramid is None else annotated[..., None, :]
        logits = losses.marginal(logits, each)
    if outputs.pyramid is None:
        ce, dice = losses.segmentation_loss(logits, label, where)
    else:
        labels = jnp.broadcast_to(label[..., None], logits.shape[:-1])
        ce, dice = heads_loss([logits], labels, where)
    terms = {"sup/generalist_ce": ce, "sup/generalist_dice": dice}
    if outputs.specialists is not None:
        groups, relabelled = outputs.specialists, pseudo_labels.relabel(label, *outputs.heads)
        if annotated is not None:
            groups = [_allowing_for_hidden(x, relabelled, annotated) for x in groups]
            everywhere = True if where is None else where[..., None]
            where = jnp.broadcast_to(annotated & everywhere, relabelled.shape)
        ce, dice = heads_loss(groups, relabelled, where)
        terms |= {"sup/specialists_ce": ce, "sup/specialists_dice": dice}
    return terms


def _allowing_for_hidden(logits, labels, annotated):
    """Logits [B, *S, n, 3] of specialists in which labelled background may be any remaining organ
    where some organ is not annotated; `labels` and `annotated` [B, *S, K] are of all."""
    if logits.shape[-1] == 2:
        return logits
    known = jnp.all(annotated, -1, keepdims=True) | jnp.any(labels > 0, -1, keepdims=True)
    return losses.marginal(logits, jnp.stack([jnp.ones_like(known), known], -1))
