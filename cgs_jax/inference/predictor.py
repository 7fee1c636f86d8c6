"""The only way to predict: volumes -> scores of classes -> labels on the volumes' own grids.

from cgs_jax.inference.predictor import Predictor
predictor = Predictor.restore("runs/acdc")
labels = predictor.segment(array)  # intensities [C, D, H, W] or [D, H, W] -> uint8 [D, H, W]
"""

import functools
import itertools
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from cgs_jax.data import cache, patches, tasks
from cgs_jax.data.grid import Grid, resize, slices_of, upsampled_labels
from cgs_jax.data.volume import Volume, finite, keep_largest, normalise
from cgs_jax.inference import windows
from cgs_jax.methods.augment import to_image
from cgs_jax.methods.base import Method
from cgs_jax.models import network
from cgs_jax.runtime import devices, run_folder
from cgs_jax.runtime.errors import UserError, check_choice
from cgs_jax.runtime.files import folder
from cgs_jax.training.checkpoints import Checkpoints
from cgs_jax.training.train_state import TrainState
from cgs_jax.training.train_step import abstract_state, make_method

CHOICES = {
    "inference": ("both", "generalist", "specialists"),
    "predict_with": ("", "student", "teacher"),
    "combine": ("average", "confidence", "vote"),
    "upsample": ("linear", "nearest"),
}


class Scoring(NamedTuple):
    """From scores on the training grid to labels on a scan's own."""

    upsample: str  # 'linear': scores are interpolated; 'nearest': labels are
    largest_component: bool  # only the largest piece of each organ is kept


LITERATURE = Scoring("nearest", False)  # how published figures were made


class Predictor:
    """A network, or several, with what makes labels of their scores.

    Attributes:
      predict: uint16 [B, *S, channels] -> scores of classes [B, *S, C]; the highest names the
        class. It is only asked for one shape: that of whole slices, or of a window. Where the task
        has not all K organs of the network, those that it has, bool [K], are the second argument.
      config: of the run, or of the first of several.
      scoring: that of `config`.
      task: the data set whose scans are segmented, with its grid, intensities and organs; `of` of a
        collection's predictor chooses it.
    """

    def __init__(self, predict: Callable[..., np.ndarray], config: ConfigDict, task: str = ""):
        self.predict, self.config, self._task = predict, config, task
        self.scoring = Scoring(config.upsample, config.largest_component)

    def of(self, task: str) -> "Predictor":
        """The same for the scans of that data set of a collection.

        Raises:
          UserError: it was not trained on.
        """
        tasks.find(self.config.data, task)
        return Predictor(self.predict, self.config, task)

    @functools.cached_property
    def task(self) -> tasks.Task:
        return tasks.find(self.config.data, self._task)

    @classmethod
    def restore(
        cls,
        workdirs: str | os.PathLike | Sequence[str | os.PathLike],
        options: Mapping[str, Any] | None = None,
        task: str = "",
    ) -> "Predictor":
        """The best checkpoint of a run, or of several that predict together.

        A run on a collection segments scans of the member `task`, with its numbers of organs.

        `options` such as {'inference': 'both', 'upsample': 'nearest', 'largest_component': True}
        replace those of the first run, which hold for all.

        Raises:
          UserError: no run, no validated checkpoint, an unknown option or task, or runs on
            different data.
        """
        workdirs = [workdirs] if isinstance(workdirs, str | os.PathLike) else workdirs
        methods, states = [], []
        for workdir in map(folder, map(str, workdirs)):
            method, state = restore_run(workdir, options)
            options = prediction_options(method.config)
            methods.append(method)
            states.append(state)
            if method.config.data.depth != methods[0].config.data.depth:
                raise UserError(f"{workdir} and {workdirs[0]} differ in data.depth")
            data, first = (tasks.members(m.config.data) for m in (method, methods[0]))
            if data.keys() != first.keys():
                raise UserError(f"{workdir} and {workdirs[0]} were trained on other data sets")
            for name, field in itertools.product(data, cache.OPTIONS):
                if data[name][field] != first[name][field]:
                    full = f"members.{name}.{field}" if name else field
                    raise UserError(
                        f"{workdir} and {workdirs[0]} differ in data.{full}; runs that are to "
                        "predict together need the same, given when they are trained"
                    )
        found = make_predictor(*methods)(*states)
        return found.of(task) if task else found

    def scores(
        self, array: np.ndarray, spacing: tuple[float, float, float] | None = None
    ) -> np.ndarray:
        """Scores of classes float32 [D, H, W, C] on the training grid; the highest names the class.
        Arguments and errors are those of `segment`."""
        slices, batch = self._to_grid(self.volume(array, spacing)), self.config.eval_batch
        if self.config.data.depth:
            return np.stack(list(self._scores_of_slices(slices)))
        parts = (slices[i : i + batch] for i in range(0, len(slices), batch))
        return np.concatenate([self._scores(part) for part in parts])

    def segment(
        self, array: np.ndarray, spacing: tuple[float, float, float] | None = None
    ) -> np.ndarray:
        """Labels of one scan: uint8 [D, H, W], 0 is the background.

        Args:
          array: intensities [C, D, H, W], or [D, H, W] of one channel, in the orientation and unit
            of the run's scans, after TransUNet's arrays of Synapse in Hounsfield units; they are
            normalised as those were.
          spacing: millimetres along D, H and W; needed where the run has `data.spacing` or
            `data.slice_spacing`.

        Raises:
          UserError: other axes or channels, a voxel that is no number, or a spacing that is lacking
            or can not be.
        """
        ((_, (label,)),) = self.labels([(None, self.volume(array, spacing))], self.scoring)
        return label

    def volume(self, array: np.ndarray, spacing: tuple[float, float, float] | None) -> Volume:
        """Intensities -> the volume that `labels` takes, each channel normalised on its own."""
        data, image = self.task.data, np.asarray(array)
        image = image[None] if image.ndim == 3 else image
        if image.ndim != 4 or len(image) != data.channels or not image.size:
            shape = np.shape(array)
            raise UserError(f"the array has shape {shape}; volumes are [{data.channels}, D, H, W]")
        if spacing is not None:
            known = np.shape(spacing) == (3,) and np.asarray(spacing).dtype.kind in "fiu"
            if not (known and np.isfinite(spacing).all() and min(spacing) > 0):
                raise UserError(f"spacing={spacing}: give millimetres along D, H and W")
        channels = (normalise(finite(x, "the array"), data.normalise) for x in image)
        return Volume(cache.quantise(np.stack(list(channels))), None, spacing)

    def labels(
        self, volumes: Iterable[tuple[Any, Volume]], *scorings: Scoring
    ) -> Iterator[tuple[Any, tuple[np.ndarray, ...]]]:
        """Segments volumes: one after the other, or slice by slice, the slices of all that have one
        shape on the training grid batched.

        Args:
          volumes: pairs of a name, which may be anything, and a volume with image uint16 [C, D, H,
            W] on a grid of its own.
          scorings: how labels are made of the scores; the scores are computed once for all.

        Yields:
          For each volume in order its name and, by each scoring, uint8 labels [D, H, W] on its own
          grid.
        """
        if self.config.data.depth:
            for name, volume in volumes:
                segmented = _Segmented(name, volume, scorings)
                image = self._to_grid(volume)
                segmented.fill_all(self._scores_of_slices(image), len(image))
                yield name, segmented.cleaned(len(self.task.data.classes))
            return
        begun: deque[_Segmented] = deque()

        def slices():
            for name, volume in volumes:
                segmented = _Segmented(name, volume, scorings)
                begun.append(segmented)
                for i, image in enumerate(self._to_grid(volume)):
                    yield segmented, i, image

        for _, alike in itertools.groupby(slices(), lambda slice: slice[-1].shape):
            while part := list(itertools.islice(alike, self.config.eval_batch)):
                scores = self._scores(np.stack([image for *_, image in part]))
                for (segmented, i, _), of_slice in zip(part, scores, strict=True):
                    segmented.fill(i, of_slice)
                while begun and begun[0].todo == 0:
                    done = begun.popleft()
                    yield done.name, done.cleaned(len(self.task.data.classes))

    def _to_grid(self, volume):
        """Slices on the grid, [D, H, W, C]."""
        grid = Grid.of(self.task.data)
        return np.moveaxis(grid.image(volume.image, volume.spacing), 0, -1)

    def _scores_of_slices(self, volume):
        """Of a volume, one slice after the other."""
        shape = patches.window(self.config.data, self._window())
        return windows.slices(self._predict, volume, shape, self.config.eval_batch)

    def _window(self):
        """Its pixels a side, where images are seen through windows: those of many shapes are."""
        data, window = self.task.data, self.config.window
        if data.spacing or self.config.data.depth:
            return window or self.config.data.patch or data.size
        return window if window < data.size else 0

    def _scores(self, images):
        """Of a batch of slices, or less."""
        window, batch = self._window(), self.config.eval_batch
        if window:
            shape = patches.window(self.config.data, window)
            return windows.blend(self._predict, images, shape, batch)
        padding = [(0, batch - len(images)), *[(0, 0)] * (images.ndim - 1)]
        return self._predict(np.pad(images, padding))[: len(images)]

    def _predict(self, images):
        """Scores of the task's own classes."""
        union, own = range(1 + len(self.config.data.classes)), self.task.union
        if own == tuple(union):
            return self.predict(images)
        return self.predict(images, np.isin(union[1:], own))[..., list(own)]


class _Segmented:
    """Labels [D, H, W] of a volume by each scoring, and how many slices are not in them yet."""

    def __init__(self, name, volume, scorings):
        shape = volume.image.shape[1:]
        self.name, self.todo = name, shape[0]
        self._each = [(np.empty(shape, np.uint8), scoring) for scoring in scorings]

    def fill_all(self, scores, count):
        """Every slice, of the scores [H, W, C] of the `count` slices on the training grid."""
        linear = [scoring.upsample == "linear" for _, scoring in self._each]
        depth = len(self._each[0][0])
        for i, of_slice in enumerate(slices_of(scores, count, depth, *linear)):
            for found, (label, scoring) in zip(of_slice, self._each, strict=True):
                label[i] = _labels(found, label.shape[1:], scoring)

    def fill(self, i, scores):
        """Slice `i`, of its scores [H, W, C] on the training grid."""
        for label, scoring in self._each:
            label[i] = _labels(scores, label.shape[1:], scoring)
        self.todo -= 1

    def cleaned(self, num_targets):
        return tuple(
            keep_largest(label, num_targets) if scoring.largest_component else label
            for label, scoring in self._each
        )


def _labels(scores, shape, scoring):
    """Of a slice of `shape`, of its scores [H, W, C] on the training grid."""
    if scoring.upsample == "linear":
        return upsampled_labels(scores[None], *shape)[0]
    return resize(np.argmax(scores, -1).astype(np.uint8)[None], *shape)[0]


def restore_run(
    workdir: pathlib.Path, options: Mapping[str, Any] | None = None
) -> tuple[Method, TrainState]:
    """A run and its best checkpoint, on the devices of this process; `options` replace its own."""
    method = load_run(workdir, options)
    checkpoints = Checkpoints(workdir, read_only=True)
    state = checkpoints.restore_best(abstract_state(method, devices.local_mesh()))
    checkpoints.close()
    return method, state


def load_run(workdir: pathlib.Path, options: Mapping[str, Any] | None = None) -> Method:
    """The method of a run, without its weights."""
    config, _ = run_folder.load(workdir)
    run_folder.check_version(config, workdir)
    if unknown := set(options or {}) - set(run_folder.PREDICTION):
        known = ", ".join(run_folder.PREDICTION)
        raise UserError(f"unknown option {min(unknown)!r} of prediction; there are: {known}")
    try:
        config.update(options or {})
    except TypeError as error:
        raise UserError(f"an option of prediction has another type: {error}") from None
    method = make_method(FrozenConfigDict(config))
    check(config, method)
    return method


def make_predictor(*methods: Method) -> Callable[..., Predictor]:
    """Compiles states -> `Predictor` for this process's devices.

    The predictions of several methods, a state each, are combined as the first's config says.
    """
    mesh, config = devices.local_mesh(), methods[0].config

    def predict(states, slices, members):
        pairs, image = zip(methods, states, strict=True), to_image(slices)
        probs = [method.predict(state, image, members) for method, state in pairs]
        return combine(jnp.concatenate(probs), config.combine)

    compiled = devices.jit(predict, mesh)

    def with_states(*states):
        # Moments of the optimiser may be too large to be whole on a device, and are not asked for.
        states = devices.localise(mesh, [state.replace(opt_state=None) for state in states])

        def run(slices, members=None):
            padding = [(0, -len(slices) % mesh.size), *[(0, 0)] * (slices.ndim - 1)]
            batch = devices.put_batch(mesh, np.pad(slices, padding))
            return np.asarray(compiled(states, batch, members))[: len(slices)]

        return Predictor(run, config)

    return with_states


def combine(probs: jax.Array, how: str) -> jax.Array:
    """Scores [B, *S, C] of several predictions [M, B, *S, C]; the highest names the class.

    'average' of the probabilities; 'confidence': at each pixel the surest prediction decides;
    'vote': the most named class, of equally often named ones the likelier.
    """
    if how == "confidence":
        surest = jnp.argmax(jnp.max(probs, -1), 0)[None, ..., None]
        return jnp.take_along_axis(probs, surest, 0)[0]
    scores = jnp.mean(probs, 0)
    if how == "vote":
        scores += jnp.sum(jax.nn.one_hot(jnp.argmax(probs, -1), probs.shape[-1]), 0)
    return scores


def prediction_options(config: ConfigDict) -> dict[str, Any]:
    """Those fields of `config` that say how a trained network predicts."""
    return {name: config[name] for name in run_folder.PREDICTION}


def check(config: ConfigDict, method: Method) -> None:
    """Raises UserError where an option of prediction has a value that can not be."""
    for name, known in CHOICES.items():
        check_choice(name, config[name], known)
    if config.inference != "generalist" and not method.specialists:
        raise UserError(f"inference={config.inference}: {config.method.name} trains no specialists")
    if config.predict_with and not method.has_teacher:
        name = f"predict_with={config.predict_with}: {config.method.name}"
        raise UserError(f"{name} has no teacher that could predict")
    stride = network.stride(config)
    if config.window < 0 or config.window % stride:
        raise UserError(f"window={config.window} does not divide by {stride}; 0: whole slices")
