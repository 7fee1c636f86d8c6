"""report.html: all of a run on one page, without server or network."""

import base64
import functools
import io
import pathlib
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

from cgs_jax.analysis import plots
from cgs_jax.data import tasks
from cgs_jax.runtime import run_folder
from cgs_jax.runtime.files import to_json, write_text
from cgs_jax.runtime.logs import time_spent
from cgs_jax.scoring import metrics, summaries

SLICES, WIDTH = 24, 256  # at most, of a case and in pixels: a report stays below some megabytes
TEMPLATE = pathlib.Path(__file__).with_name("report.html")


def write(
    workdir: pathlib.Path,
    config: ConfigDict,
    summary: dict[str, Any],
    cases: list[plots.Shown],
    curves: Figure | None,
) -> None:
    """Writes the report of a tested run; `cases` are shown slice by slice."""
    minutes, hardware = time_spent(workdir)
    organs = tasks.organs(config.data)
    split = summaries.final_split(summary)
    name = summaries.SPLITS[split]
    data = {
        "title": f"{run_folder.name_of(config)} on {config.data.name}",
        "facts": {
            f"{name} Dice, best checkpoint on validation": _dice(summary, split),
            f"{name} Dice, last checkpoint": _dice(summary["last"], split),
            "seed": config.seed,
            "training and validation": f"{minutes:.1f} minutes",
            "hardware": hardware,
            "folder": str(workdir),
        },
        "organs": {organ: to_hex(plots.colour(i)) for i, organ in enumerate(organs)},
        "errors": plots.ERRORS,
        "curves": _svg(curves) if curves else None,
        "summary": {s: summary[s] for s in summaries.SPLITS if s in summary},
        "splits": summaries.SPLITS,
        "heads": metrics.HEADINGS | {"voxels": "true voxels"},
        "shares": metrics.SHARES,
        "final": split,
        "shown": [slices(shown) for shown in cases],
        "config": config.to_dict(),
    }
    # Inside <script>, "</script>" would end it and "<!--" hide its end.
    page, text = TEMPLATE.read_text(encoding="utf-8"), to_json(data).replace("<", "\\u003c")
    write_text(workdir / "report.html", page.replace("{{DATA}}", text))


def _dice(scored, split):
    return f"{100 * scored[split]['mean']['dice']:.2f} % (step {scored['step']})"


def _svg(figure):
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return _uri("svg+xml", file)


def _uri(kind, file):
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def slices(shown):
    """All panels of the slices that hold an organ, or were thought to, as one picture each."""
    there = np.flatnonzero((np.asarray(shown.truth) | shown.label).any((1, 2)))
    first, last = (there[0], there[-1]) if len(there) else (0, len(shown.truth) - 1)
    numbers = np.unique(np.linspace(first, last, min(SLICES, last - first + 1)).round().astype(int))
    every = [np.stack(plots.panels(shown, at)) for at in numbers]
    box, pictures = plots.body(functools.reduce(np.maximum, every)), []
    for panels in every:
        picture, file = Image.fromarray(np.concatenate(panels[:, *box], 1)), io.BytesIO()
        # Pixels become squares, and none is left out.
        wide, high = max(1, 1 / shown.aspect), max(1, shown.aspect)
        size = round(picture.width * wide), round(picture.height * high)
        picture = picture.resize(size, Image.Resampling.NEAREST)
        picture.thumbnail((len(panels) * WIDTH, WIDTH), Image.Resampling.NEAREST)
        picture.save(file, "JPEG", quality=88)
        pictures.append(_uri("jpeg", file))
    start = int(np.argmin(np.abs(numbers - plots.fullest_slice(shown.truth))))
    about = {"case": shown.case, "dice": shown.dice, "numbers": numbers.tolist(), "start": start}
    return about | {"pictures": pictures}
