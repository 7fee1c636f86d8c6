"""Synthetic thorax CT phantoms in the folder layout of the SegTHOR data set.

Nothing here comes from a patient: analytic organs on a randomly deformed grid, then
partial-volume blur and correlated noise. Proportions follow the description of SegTHOR (Lambert
et al., 2020, arXiv 1912.05950): a large heart, a mid-sized aorta, a small trachea and a small
low-contrast esophagus, among unlabelled look-alikes. They show that a pipeline runs and learns;
a score on them says nothing about a score on real CT.
"""

from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
from absl import flags
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from cgs_jax.runtime.cli import cli
from cgs_jax.runtime.errors import UserError

ESOPHAGUS, HEART, TRACHEA, AORTA = 1, 2, 3, 4
FOV_MM, HEIGHT_MM = 380.0, 176.0
SPLITS = Path(__file__).parent / "published" / "segthor"
MARK = "PHANTOM.txt"  # only folders that carry it are written over


def _field(rng, shape, modes):
    """Smooth random field [shape], mean 0 and sd 1, out of `modes` cosine waves per axis."""
    field = rng.standard_normal(modes, dtype=np.float32)
    field[0, 0, 0] = 0  # a constant would move the mean
    for n, m in zip(shape, modes, strict=True):
        wave = np.cos(np.pi / n * np.outer(np.arange(m), np.arange(n) + 0.5))
        # contracting the first axis appends the new one, so three turns restore the order
        field = np.tensordot(field, wave.astype(np.float32), (0, 0))
    return field / field.std()


def _grid(rng, size, depth):
    """Anatomical coordinates of the voxels: x, y [size, size, depth] mm, w [depth] in 0..1."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5) * FOV_MM
    w = (np.arange(depth, dtype=np.float32) + 0.5) / depth
    # deforming the coordinates deforms every organ at once and keeps image and label aligned
    x, y = (4.5 * _field(rng, (size, size, depth), (5, 5, 4)) for _ in range(2))
    x += line[:, None, None] - rng.normal(0, 10) + rng.normal(0, 12) * (w - 0.5)
    y += line[None, :, None] - rng.normal(0, 10) + rng.normal(0, 12) * (w - 0.5)
    turn, stretch = rng.normal(0, 0.1), rng.uniform(0.86, 1.14, 2).tolist()
    c, s = float(np.cos(turn)), float(np.sin(turn))
    x, y = (c * x + s * y) / stretch[0], (c * y - s * x) / stretch[1]
    return x, y, w * np.float32(rng.uniform(0.95, 1.04)) + np.float32(rng.uniform(-0.02, 0.02))


def _path(rng, w, *nodes):
    """Wobbling centre line near `nodes` (w, x mm, y mm) from bottom to top: x, y [depth] mm."""
    at, *axes = np.transpose(nodes)
    for axis in axes:
        line = PchipInterpolator(at, axis + rng.normal(0, 2.5, len(axis)))(w)
        wave = np.sin(2 * np.pi * (rng.uniform(0.6, 1.6) * w + rng.random()))
        yield (line + rng.normal(0, 2.5) * wave).astype(np.float32)


def _tube(x, y, cx, cy, rx, ry):
    """Elliptic radius around a centre line, 1 on the wall: [size, size, depth]."""
    return np.hypot((x - cx) / rx, (y - cy) / ry)


def _chain(x, y, w, *nodes):
    """Distance in mm to the polyline through `nodes` (w, x mm, y mm): [size, size, depth]."""
    nearest = np.float32(np.inf)
    for p, q in pairwise(nodes):
        dz, dx, dy = (q[0] - p[0]) * HEIGHT_MM, q[1] - p[1], q[2] - p[2]
        gx, gy, gz = x - p[1], y - p[2], (w - p[0]) * HEIGHT_MM
        t = np.clip((gx * dx + gy * dy + gz * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
        gx, gy, gz = gx - t * dx, gy - t * dy, gz - t * dz
        nearest = np.minimum(nearest, gx * gx + gy * gy + gz * gz)
    return np.sqrt(nearest)


def _aorta(rng, x, y, w, size):
    """Wall radius of ascending aorta, arch and descending aorta, and the arch's foot (as w)."""
    r_up, r_down, foot = 15.5 * size, 12.5 * size, rng.uniform(0.63, 0.67)
    up = [*_path(rng, w, (-0.1, -8, -42), (0.45, -14, -42), (0.7, -6, -42), (1.1, -6, -42))]
    down = [*_path(rng, w, (-0.1, 16, 31), (0.3, 25, 31), (0.7, 28, 28), (1.1, 28, 28))]
    (ax, ay), (bx, by) = ([float(np.interp(foot, w, c)) for c in line] for line in (up, down))
    # the arch joins the two tubes in half an ellipse, bowed leftward around the trachea
    turn = np.linspace(0, np.pi, 8)
    f, bow, rise = (1 - np.cos(turn)) / 2, np.sin(turn) ** 2, rng.uniform(0.1, 0.13)
    arch = (foot + rise * np.sin(turn), ax + f * (bx - ax) + 15 * bow, ay + f * (by - ay) - 7 * bow)
    arch = _chain(x, y, w, *np.transpose(arch).tolist()) / (14 * size)
    rise = _tube(x, y, *up, r_up, r_up) + 9 * ((w < 0.38) | (w > foot))  # it starts in the heart
    fall = _tube(x, y, *down, r_down, r_down) + 9 * (w > foot)
    return np.minimum(np.minimum(rise, fall), arch), foot


def _airway(rng, x, y, w, carina, r):
    """Wall radius of the trachea above `carina`, and of the two main bronchi below it."""
    line = [*_path(rng, w, (-0.1, -5, -2), (0.5, -5, -2), (0.75, -6, -4), (1.1, -1, -8))]
    cx, cy = (float(np.interp(carina, w, c)) for c in line)
    flare = 1 + 0.4 * np.exp(-20 * np.abs(w - carina))  # it widens just before it splits
    right, left = (carina - 0.23, cx - 42, cy + 6), (carina - 0.19, cx + 50, cy + 8)
    bronchi = _chain(x, y, w, right, (carina + 0.02, cx, cy), left) / (0.7 * r)
    return _tube(x, y, *line, r * flare, r) + 9 * (w < carina), bronchi


def _heart(rng, x, y, w):
    """Radius of the heart (1 on the surface) and a mask of its muscle: free wall and septum."""
    a, b = 60 * rng.uniform(0.82, 1.18), 47 * rng.uniform(0.82, 1.18)
    top, c, turn = rng.uniform(0.4, 0.5), rng.uniform(0.2, 0.26), rng.normal(0.6, 0.2)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    # the back stays before the esophagus whatever the size; the apex leans left and down
    gx, gy = x - 16 + 60 * (w - top + c), y - 11 + float(np.hypot(a * sin, b * cos))
    u, v = (gx * cos - gy * sin) / a, (gx * sin + gy * cos) / b
    z = (w - top + c) / np.float32(c)
    radius = (np.abs(u) ** 2.3 + np.abs(v) ** 2.3 + np.abs(z) ** 2.3) ** np.float32(1 / 2.3)
    radius *= 1 + 0.05 * _field(rng, x.shape, (9, 9, 4))  # chambers bulge
    return radius, (u > -0.15) & ((radius > 0.8) | (np.abs(v + 0.15 - 0.2 * u) < 0.1))


def _vessels(rng, x, y, w, foot, blood):
    """Unlabelled look-alikes of aorta and esophagus: (wall radius field, mm, HU) each."""
    cava = _path(rng, w, (-0.1, -32, -26), (0.6, -32, -32), (1.1, -24, -28))
    yield _tube(x, y, *cava, 9, 9) + 9 * (w < 0.42), 9, blood * rng.uniform(0.8, 1.3)
    for r, cx, cy in (6.5, -10, -28), (4.5, 12, -20), (5.5, 22, 4):  # branches of the arch
        neck = _path(rng, w, (0.6, cx, cy), (1.1, 1.2 * cx, cy + 2))
        yield _tube(x, y, *neck, r, r) + 9 * (w < foot + 0.12), r, blood
    trunk, fork = (foot - 0.25, 14, -56), (foot - 0.13, 18, -24)  # of the pulmonary artery
    branches = (foot - 0.15, -48, -14), fork, (foot - 0.12, 48, 0)
    yield _chain(x, y, w, *branches, fork, trunk) / 10, 10, blood * rng.uniform(0.8, 1.3)
    azygos = _path(rng, w, (-0.1, -9, 30), (0.55, -10, 30), (1.1, -14, 34))
    yield _tube(x, y, *azygos, 4.8, 4.8), 4.8, rng.uniform(30, 55)


def _torso(rng, x, y, w, core):
    """HU of body wall, bones, fat and lungs, no lung inside `core`; mask of the chest cavity."""
    texture = [_field(rng, x.shape, (30, 30, 14)) for _ in range(2)]
    taper = 1 - 0.3 * np.clip((w - 0.4) / 0.6, 0, 1) ** 1.5
    chest = _tube(x, y, 0, -3, 124 * taper, 92 * (0.4 + 0.6 * taper))
    skin = (np.abs(x / 162) ** 2.4 + np.abs(y / 121) ** 2.4) ** np.float32(1 / 2.4)
    fat, bone, rim = rng.uniform(-115, -90), rng.uniform(180, 320), rng.uniform(0.05, 0.15)
    hu = np.where(skin < 1, np.float32(fat), np.float32(-1000))
    hu[(skin < 1 - rim) & (np.abs(texture[0]) > 0.12)] = rng.normal(52, 5)  # fat planes between
    # ribs run down from back to front, so an axial slice cuts each of them only in part
    level = w * HEIGHT_MM / 27 + rng.random()
    rib, disc = np.cos(2 * np.pi * (level + y / 54)) > 0.1, np.cos(2 * np.pi * level) > 0.7
    hu[rib & (chest > 1.02) & (chest < 1.1) & (y > -60)] = bone
    hu[(np.abs(x) < 16) & (chest > 1.03) & (chest < 1.15) & (y < 0)] = 0.6 * bone  # sternum
    hu[chest < 1] = fat + rng.uniform(0, 50)
    hu[(chest < 1) & (texture[1] > 1.3)] = 40  # nodes and strands in the mediastinal fat
    # two random surfaces meet in curves: lung vessels, wider towards the hila
    thread = np.hypot(*texture) * (0.5 + np.hypot(np.abs(x) - 40, y) / 80)
    air = np.where(thread < 0.3, np.float32(20), rng.uniform(-890, -810) + 0.5 * y)
    spine, canal, side = _tube(x, y, 0, 51, 19, 14.5), _tube(x, y, 0, 75, 9, 8), np.abs(x)
    gutter = (side < 34) & (y > 60)
    core = core | gutter | (spine < 1.2) | (_tube(x, y, 0, -20, 26, 72) < 1)
    np.copyto(hu, air, where=(chest < 1) & ~core)
    hu[gutter & (chest < 1)] = 52
    hu[spine < 1] = np.where(spine < 0.8, 0.6, 1.2)[spine < 1] * bone
    hu[(spine < 1) & disc] = 90
    wing = (side < 36) & (np.abs(y - 68 - 0.2 * side) < 5) & ~disc
    hu[(canal < 1.5) | wing | ((side < 3.5) & (y > 82) & (y < 104))] = bone
    hu[canal < 1] = 30
    return hu, chest < 1


def make_case(rng, size=128, depth=32):
    """Draw one thorax phantom from a `numpy.random.Generator`: (image, label).

    Both are [size, size, depth], stored (x, y, z) for a supine patient: x grows to the patient's
    left, y to the back, z to the head (axis codes LPS). A voxel spans 380 / size mm in plane and
    176 / depth mm along z. The image is int16 in Hounsfield units; the label is uint8: 0
    background, 1 esophagus, 2 heart, 3 trachea, 4 aorta.
    """
    x, y, w = _grid(rng, size, depth)
    thick, wide, bore = rng.uniform(0.78, 1.25, 3).tolist()
    aorta, foot = _aorta(rng, x, y, w, thick)
    carina = foot - rng.uniform(0.08, 0.12)
    trachea, bronchi = _airway(rng, x, y, w, carina, 9.5 * bore)
    heart, muscle = _heart(rng, x, y, w)
    gullet = _path(rng, w, (-0.1, 6, 12), (0.25, 3, 18), (0.5, 2, 16), (0.75, 2, 14), (1.1, 4, 16))
    esophagus = _tube(x, y, *gullet, 8.6 * wide, 6.5 * wide)
    enhanced = rng.random() < 0.6  # contrast agent in some scans only
    blood, meat = rng.uniform((90, 60), (300, 110)) if enhanced else rng.uniform(38, 56, 2)
    vessels = list(_vessels(rng, x, y, w, foot, blood))

    core = (aorta < 1.25) | (heart < 1.06) | (trachea < 1.4) | (bronchi < 1.5) | (esophagus < 1.4)
    for field, r, _ in vessels:
        core |= field < 1 + 3 / r
    hu, chest = _torso(rng, x, y, w, core)
    for dome_x, high in (-64, rng.uniform(0.06, 0.18)), (68, rng.uniform(0, 0.1)):
        dome = np.hypot(_tube(x, y, dome_x, 5, 60, 80), (w + 0.25) / (0.25 + high)) < 1
        hu[dome & chest] = meat + rng.uniform(0, 15)  # liver and spleen under the lungs
    heart = (heart < 1) & (esophagus > 1.1) & (aorta > 1.1) & chest
    hu[heart] = blood * rng.uniform(0.85, 1.1)
    hu[heart & muscle] = meat
    for field, _, value in vessels:
        hu[field < 1] = value
    hu[aorta < 1] = blood
    hu[esophagus < 1] = rng.uniform(15, 55)
    # swallowed gas fills the lumen along some stretches of some cases only
    gas = np.sin(2 * np.pi * (rng.uniform(0.7, 2) * w + rng.random())) > rng.uniform(0, 2)
    hu[(esophagus < 0.45) & gas] = -800
    pipe = np.minimum(trachea, bronchi)
    hu[pipe < 1.05] = 20
    hu[pipe < 0.85] = -1000

    label = HEART * heart.astype(np.uint8)
    label[aorta < 1] = AORTA
    label[esophagus < 1] = ESOPHAGUS
    # readers follow the airway just past its fork; the bronchi below stay unlabelled
    label[(trachea < 1) | ((bronchi < 1) & (w > carina - 0.05))] = TRACHEA
    # blur stands for partial volume, filtered noise for the grain of a reconstruction kernel
    noise = gaussian_filter(rng.standard_normal(x.shape, dtype=np.float32), (0.7, 0.7, 0.3))
    noise *= rng.uniform(10, 40) / noise.std()
    hu = np.rint(gaussian_filter(hu, (0.6, 0.6, 0.3)) + noise)
    return np.clip(hu, -1024, 3071).astype(np.int16), label


def write(out, cases, size, depth, seed):
    """Write OUT/NAME/NAME.nii.gz (HU) and, where asked, OUT/NAME/GT.nii.gz (labels).

    `cases` maps a case name to whether its labels are written; `size` and `depth` (voxels) are
    those of `make_case`. A case depends on `seed` and its index in `cases` only. Phantoms of the
    same names are replaced; a folder that holds anything else is refused.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise UserError(f"{out} holds other files; phantoms need a folder of their own")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text(f"Synthetic scans, seed {seed}: nothing here comes from a patient.\n")
    pixel, gap = FOV_MM / size, HEIGHT_MM / depth
    affine = np.diag([-pixel, -pixel, gap, 1.0])  # voxel axes are LPS, the world of NIfTI is RAS
    affine[:3, 3] = (FOV_MM - pixel) / 2, (FOV_MM - pixel) / 2, -HEIGHT_MM
    for index, (name, labelled) in enumerate(tqdm(cases.items(), "phantoms", disable=None)):
        hu, label = make_case(np.random.default_rng([seed, index]), size, depth)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(hu, affine), folder / f"{name}.nii.gz")
        (folder / "GT.nii.gz").unlink(missing_ok=True)  # an earlier run may have left one
        if labelled:
            nib.save(nib.Nifti1Image(label, affine), folder / "GT.nii.gz")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "folder to fill with Patient_01 to Patient_40")
    _SIZE = flags.DEFINE_integer("size", 128, "rows and columns", lower_bound=1)
    _DEPTH = flags.DEFINE_integer("depth", 32, "slices", lower_bound=1)
    _SEED = flags.DEFINE_integer("seed", 0, "of all that is random", lower_bound=0)
    _LABELLED = flags.DEFINE_integer("labelled", 3, "training cases with labels", lower_bound=0)
    flags.mark_flag_as_required("out")

    def _main(_):
        train, val, test = (
            (SPLITS / f"{s}.txt").read_text().split() for s in ("train", "val", "test")
        )
        if _LABELLED.value > len(train):
            raise UserError(f"--labelled must lie in 0..{len(train)}")
        labelled = {*train[: _LABELLED.value], *val, *test}
        patients = {f"Patient_{i:02d}": f"Patient_{i:02d}" in labelled for i in range(1, 41)}
        write(Path(_OUT.value), patients, _SIZE.value, _DEPTH.value, _SEED.value)

    cli(_main)
