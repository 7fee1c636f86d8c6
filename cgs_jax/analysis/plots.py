"""Figures: learning curves, and overlays of labels on slices."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import ndimage

from cgs_jax.data.prepared import Prepared
from cgs_jax.data.volume import NO_LABEL
from cgs_jax.inference.predictor import Predictor
from cgs_jax.runtime.files import whole
from cgs_jax.scoring import summaries

SOURCES = {
    "generalist": "generalist, confident",
    "specialists": "specialists",
    "ihed": "specialists after IHED",
    "consensus": "where both agree",
}
ERRORS = {"missed": "deepskyblue", "too much": "red", "other organ": "gold"}


def save(figure: Figure, path: pathlib.Path, **options: Any) -> None:
    """Writes a figure whole or not at all, also into a bucket."""
    with whole(path) as unfinished, unfinished.open("wb") as file:
        figure.savefig(file, format=path.suffix[1:], **options)


def colour(i: int) -> Any:
    """Distinct colour of organ `i`, counted from 0."""
    return matplotlib.colormaps["tab10" if i < 10 else "tab20b"](i % 20)


def curves(lines: list[dict[str, float]], organs: Sequence[str]) -> Figure | None:
    """Losses, validation Dice by organ, and coverage and precision of pseudo-labels over the steps
    of metrics.jsonl; None if it is empty."""
    groups = {
        "loss": {
            "loss": "total",
            "sup": "supervised",
            "unsup": "unsupervised (unweighted)",
            "cgs/unsup": "of CGS over it (unweighted)",
        },
        "validation Dice %": {f"val/{organ}": organ for organ in organs} | {"val/dice": "mean"},
        "share of unlabelled pixels": {
            "cover/g": "confident",
            "cover/s": "IHED",
            "cover/e": "agree",
            "cover/sure": "sure",
        },
        "pseudo-labels: organ pixels covered %": _of_sources("coverage"),
        "pseudo-labels: precision %": _of_sources("precision"),
    }
    groups = {
        title: names
        for title, names in groups.items()
        if any(line.get(key) is not None for line in lines for key in names)
    }
    if not groups:
        return None
    figure = Figure(figsize=(6 * min(len(groups), 3), 3.6 * -(-len(groups) // 3)))
    figure.set_layout_engine("constrained")
    for i, (title, names) in enumerate(groups.items(), 1):
        axes = figure.add_subplot(-(-len(groups) // 3), min(len(groups), 3), i)
        for nth, (key, name) in enumerate(names.items()):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                style = {"color": colour(nth)}
                if key == "val/dice":
                    style = {"color": "black", "lw": 2}
                axes.plot(*zip(*points, strict=True), ".-", label=name, **style)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")  # it would hide lines
    return figure


def _of_sources(what):
    return {f"pseudo/{source}/{what}": name for source, name in SOURCES.items()}


class Shown(NamedTuple):
    """A case to look at: volumes [D, H, W], of the image the first channel."""

    case: str
    dice: float  # %, mean over the organs
    slicing: str
    image: np.ndarray
    truth: np.ndarray  # numbers of organs count those of all data sets of a collection
    label: np.ndarray
    aspect: float = 1.0  # height by width of a pixel


def show(predictor: Predictor, prepared: Prepared, cases: list[tuple[str, float]]) -> list[Shown]:
    """Cases with their Dice, predicted again to be looked at."""
    found, dice = {}, dict(cases)
    for case, (label,) in summaries.segmented(predictor, prepared, dice, predictor.scoring):
        task, volume = prepared.task(case), prepared.volume(case)
        known = prepared.organs(case)
        marked = [i for i, organ in enumerate(task.data.classes, 1) if organ in known]
        label = np.where(volume.label == NO_LABEL, 0, label)
        both = (x.astype(np.int32) for x in (volume.label, label))
        labels = (np.where(np.isin(x, marked), x + task.first, 0) for x in both)
        image, slicing = volume.image[0], task.data.slicing
        found[case] = Shown(case, dice[case], slicing, image, *labels, volume.aspect)
    return [found[case] for case, _ in cases]


def fullest_slice(truth: np.ndarray) -> int:
    """The slice of [D, H, W] with most organs, and of those the one with most area."""
    flat = truth.reshape(len(truth), -1)
    return int(np.argmax([len(np.unique(s)) + np.count_nonzero(s) / s.size for s in flat]))


def panels(shown: Shown, at: int) -> list[np.ndarray]:
    """RGB uint8 of slice `at`: the image, with truth, with prediction, and with what is wrong.

    Oriented scans are turned as radiologists look at them: anterior or superior up, and the
    patient's right on the left. Those that were cut along their coarsest axis are not mirrored, for
    which axis that was is not kept.
    """
    turned = slice(None) if shown.slicing == "stored" else slice(None, None, -1)
    mirrored = turned if shown.slicing in ("axial", "coronal") else slice(None)
    image, truth, label = (
        np.asarray(x[at])[turned, mirrored] for x in (shown.image, shown.truth, shown.label)
    )
    grey = np.repeat(image[..., None] / max(image.max(), 1), 3, -1)
    wrong = np.select(
        [truth == label, label == 0, truth == 0], [0, 1, 2], 3
    )  # as ERRORS, counted from 1
    colours = [to_rgb(c) for c in ERRORS.values()]
    overlays = (_paint(grey, x) for x in (truth, label))
    return [np.uint8(255 * x) for x in (grey, *overlays, _paint(grey, wrong, colours))]


def _paint(grey, labels, colours=None):
    colours = colours or [colour(i)[:3] for i in range(int(labels.max(initial=0)))]
    painted = 0.45 * grey + 0.55 * np.array([(0, 0, 0), *colours])[labels]
    return np.where(labels[..., None] > 0, painted, grey)


def body(pictures: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the smallest box, and a small margin, that holds every pixel of RGB
    [N, H, W, 3] that is not nearly black: around a neck most of a picture is air."""
    seen = np.any(pictures > 12, (0, -1))
    box = ndimage.find_objects(seen.view(np.uint8))
    if not box:
        return slice(None), slice(None)
    more = 1 + max(seen.shape) // 50
    return tuple(slice(max(x.start - more, 0), x.stop + more) for x in box[0])


def overlays(cases: list[Shown], organs: Sequence[str]) -> Figure:
    """Image, truth, prediction and error of the fullest slice of every case."""
    figure = Figure(figsize=(12, 3 * len(cases) + 0.5), layout="constrained")
    for row, shown in zip(figure.subplots(len(cases), 4, squeeze=False), cases, strict=True):
        titles = (shown.case, "truth", f"prediction, Dice {shown.dice:.1f}", "error")
        pictures = np.stack(panels(shown, fullest_slice(shown.truth)))
        for axes, title, picture in zip(row, titles, pictures[:, *body(pictures)], strict=True):
            axes.imshow(picture, interpolation="nearest", aspect=shown.aspect)
            axes.set_title(title, fontsize=9)
            axes.axis("off")
    patches = [Patch(color=colour(i), label=organ) for i, organ in enumerate(organs)]
    patches += [Patch(color=c, label=f"error: {name}") for name, c in ERRORS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(7, len(patches)))
    return figure
