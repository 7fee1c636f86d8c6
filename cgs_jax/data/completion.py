"""What the files of a data set tell of its configuration."""

import functools
import math
import pathlib

from ml_collections import ConfigDict

from cgs_jax.data import fingerprint, proposal, tasks
from cgs_jax.data.volume import NO_LABEL, stored_labels
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError

MOST_CLASSES = NO_LABEL - 1
# Columns, and a curve, beside those of the organs.
RESERVED = {"mean", "dice", "row", "seed", "seeds", "difference", "low", "high"}
GRID = ("size", "spacing", "slice_spacing", "patch")  # of data


def complete(
    data: ConfigDict, saved: ConfigDict | None = None, stride: int = 16, poolings: int = 0
) -> None:
    """Fills in what is empty in `config.data` or left to its files: classes and channels, whether
    some cases are annotated for some organs only, grid, windows and intensities.

    `saved` has the data of a run that goes on: what was found then of its scans stays, though there
    may be more of them now. Sides of windows will divide by `stride`; `poolings` is how often a
    backbone for volumes pools, 0 for slices.

    Raises:
      UserError: what the files give can not be, or members of a collection do not fit each other.
    """
    if data.name != tasks.COLLECTION:
        module = tasks.layout(data)
        _fill(data, module, "classes", "numbers", "ignore", "regions")
        _check_labels(data)
        _fill(data, module, "channels", "partial")
        data.partial |= data.ignore > 0  # where nobody annotated, no organ is annotated
        facts = functools.cache(lambda: fingerprint.of_training(data))  # looked up if needed
        _complete_grid(data, saved, facts, stride, poolings)
        found = {"spacing": ("median", lambda: fingerprint.median(facts(), "spacing"))}
        found["slice_spacing"] = ("median", lambda: fingerprint.median(facts(), "slice_spacing"))
        found["normalise"] = ("auto", lambda: fingerprint.normalisation(data))
        for field, (left_open, look_up) in found.items():
            if data[field] == left_open:
                with data.ignore_type():
                    data[field] = saved[field] if saved else look_up()
                say(f"{field}: {data[field]}")
        if facts.cache_info().currsize and not saved and data.slicing != "coarsest":
            fingerprint.tell_of_long_pixels(facts())
        return
    if not data.members:
        raise UserError("data.members is empty: a collection needs at least one data set")
    for name, own in data.members.items():
        own.root = own.root or str(pathlib.Path(data.root) / name)
        own.cache = own.cache or (data.cache and str(pathlib.Path(data.cache) / name))
        own.size = own.size or data.size
        with tasks.of_member(name):
            complete(own, saved and saved.members.get(name))
    data.classes = tuple(dict.fromkeys(o for own in data.members.values() for o in own.classes))
    if len(data.classes) > MOST_CLASSES:
        raise UserError(f"{len(data.classes)} organs in all; at most {MOST_CLASSES} are stored")
    data.partial = True  # members leave out each other's organs
    counts = {name: own.channels for name, own in data.members.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"members of a collection need as many channels each, not {counts}")
    data.channels = next(iter(counts.values()))


def _fill(data, module, *fields):
    """What is empty by what the layout's `module` finds in the files."""
    for field in fields:
        if not data[field] and hasattr(module, field):
            data[field] = getattr(module, field)(data)


def _check_labels(data):
    """Raises UserError where names and numbers of labels can not be."""
    classes, (_, *numbers) = data.classes, stored_labels(data.classes, data.numbers)
    if not all(isinstance(name, str) for name in classes):
        raise UserError(f"data.classes={classes}: names of organs are texts")
    if len(numbers) != len(classes):
        raise UserError(
            f"data.classes has {len(classes)} names, and label files {len(numbers)} numbers of "
            f"organs: {', '.join(map(str, numbers))}"
        )
    if len(classes) > MOST_CLASSES:
        raise UserError(f"{len(classes)} organs; at most {MOST_CLASSES} are stored")
    if len(set(classes)) < len(classes):
        raise UserError(f"data.classes has a name twice: {', '.join(classes)}")
    whole = all(type(number) is int for number in numbers)
    if not whole or len(set(numbers)) < len(numbers) or min(numbers, default=1) < 1:
        raise UserError(f"data.numbers={data.numbers}: organs have numbers of their own, 1, 2, ...")
    if data.ignore < 0 or data.ignore in numbers:
        raise UserError(f"data.ignore={data.ignore}: a number that no organ has, or 0 for none")
    for region in data.regions:
        match region:
            case str(), (_, *_) as organs:
                if not set(organs) <= set(range(1, 1 + len(classes))):
                    problem = f"{region} names organs besides 1 to {len(classes)}"
                    raise UserError(f"data.regions: {problem}")
            case _:
                raise UserError(f"data.regions: {region!r} is not (name, numbers of its organs)")
    if taken := RESERVED & {*classes, *(name for name, _ in data.regions)}:
        raise UserError(f"rename the organ {min(taken)!r}: tables of scores use that word")


def _complete_grid(data, saved, facts, stride, poolings):
    """What of GRID is 'auto': squares where `data.size` is given, else what fits the scans."""
    for field in ("spacing", "slice_spacing"):
        value, number = data[field], type(data[field]) in (int, float)
        if value not in ("auto", "median") and not (number and 0 <= value < math.inf):
            raise UserError(f"data.{field}={value}: give millimetres, such as 1.5, or median")
    auto = [field for field in GRID if data.get(field) == "auto"]
    if auto and "patch" not in data:
        raise UserError(f"data.{auto[0]}=auto is for a data set by itself; give a number")
    if auto:
        found = saved or _fitting(data, facts, stride, poolings)
        with data.ignore_type():
            for field in auto:
                data[field] = found[field]
        if chosen := ", ".join(f"{field} {data[field]}" for field in auto if data[field]):
            say(f"grid: {chosen}")
    for field, least in (("size", 1), ("patch", 0)):
        value = data.get(field, least)
        if type(value) is not int or value < least:
            raise UserError(f"data.{field}={value}: give a whole number of pixels")


def _fitting(data, facts, stride, poolings):
    """Values of GRID; `facts` looks at the training scans."""
    squares = {"size": data.size, "spacing": 0, "slice_spacing": 0, "patch": 0}
    if data.size != "auto":
        return squares
    pixel = fingerprint.median(facts(), "spacing") if data.spacing == "median" else data.spacing
    pixel = 0 if pixel == "auto" else pixel
    fields = proposal.of_scans(facts(), stride, "other", poolings, pixel)
    found = squares | {name: fields.get(f"data.{name}", 0) for name in GRID}
    found["size"] = found["size"] or (data.patch != "auto" and data.patch) or found["patch"]
    return found
