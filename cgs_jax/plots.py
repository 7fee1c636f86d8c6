"""curves.png and overlays.png."""

import pathlib
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from ml_collections import ConfigDict

from cgs_jax import distributed
from cgs_jax.evaluate import Results, mean


def curves(lines: list[dict[str, float]], classes: tuple[str, ...], path: pathlib.Path) -> None:
    """Losses, validation Dice by organ and mask coverage over the steps of metrics.jsonl."""
    cover = {"cover/g": "confident", "cover/s": "IHED", "cover/e": "agree"}
    groups = {
        "loss": {"loss": "total", "sup": "supervised", "unsup": "unsupervised (unweighted)"},
        "validation Dice %": {f"val/{organ}": organ for organ in classes} | {"val/dice": "mean"},
        "share of unlabelled pixels": cover,
    }
    groups = {t: g for t, g in groups.items() if any(k in line for line in lines for k in g)}
    if not groups:  # metrics.jsonl was not kept
        return
    figure = Figure(figsize=(5 * len(groups), 3.6), layout="constrained")
    for axes, (title, names) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        for i, (key, name) in enumerate(names.items()):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                style = {"color": "black", "lw": 2} if key == "val/dice" else {"color": colour(i)}
                axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with path.open("wb") as file:
        figure.savefig(file, dpi=120)


def colour(i: int) -> Any:
    """Distinct colour of organ `i`, counted from 0."""
    return (
        matplotlib.colormaps["tab10"](i % 10) if i < 10 else matplotlib.colormaps["tab20b"](i % 20)
    )


class Looks:
    """Collects a telling slice of every case: most organs, then most area."""

    def __init__(self):
        self.slices: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __call__(self, case, image, truth, label):
        flat = truth.reshape(len(truth), -1)
        organs = [len(np.unique(s)) + np.count_nonzero(s) / s.size for s in flat]
        at = int(np.argmax(organs))
        self.slices[case] = tuple(np.array(x[at]) for x in (image, truth, label))

    def gather(self) -> None:
        """Adds what the other processes have collected."""
        for slices in distributed.gather(self.slices):
            self.slices |= slices


def overlays(
    looks: Looks, results: Results, data: ConfigDict, path: pathlib.Path, count: int = 4
) -> None:
    """Image, truth and prediction of `count` cases, from the worst mean Dice to the best.

    Oriented scans are shown as radiologists look at them: anterior or superior up, and the
    patient's right on the left.
    """
    classes = data.classes

    def dice(case):
        return mean(s["dice"] for s in results[case].values())

    ranked = sorted(results, key=lambda case: (np.isnan(dice(case)), dice(case)))
    picks = sorted({round(i) for i in np.linspace(0, len(ranked) - 1, min(count, len(ranked)))})
    figure = Figure(figsize=(9, 3 * len(picks) + 0.5), layout="constrained")
    colours = ListedColormap([colour(i) for i in range(len(classes))])
    for row, pick in zip(figure.subplots(len(picks), 3, squeeze=False), picks, strict=True):
        case = ranked[pick]
        image, truth, label = looks.slices[case]
        for axes, title, overlay in zip(
            row,
            (case, "truth", f"prediction, Dice {100 * dice(case):.1f}"),
            (None, truth, label),
            strict=True,
        ):
            axes.imshow(image, cmap="gray")
            if overlay is not None:
                shown = np.ma.masked_equal(overlay, 0)
                axes.imshow(
                    shown,
                    cmap=colours,
                    alpha=0.55,
                    interpolation="nearest",
                    vmin=1,
                    vmax=len(classes) + 1e-3,
                )
            axes.set_title(title, fontsize=9)
            axes.axis("off")
            if data.slicing != "stored":
                axes.invert_yaxis()
            if data.slicing in ("axial", "coronal"):
                axes.invert_xaxis()
    patches = [Patch(color=colour(i), label=organ) for i, organ in enumerate(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(6, len(classes)))
    with path.open("wb") as file:
        figure.savefig(file, dpi=110)
