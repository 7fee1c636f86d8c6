"""Synthetic images: organs that are moved and pasted, against cases made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.methods import augment, cmems, synthesis
from cgs_jax.training import train_step
from steps import tiny, tiny_batch

STILL = {"rotation": 0.0, "scale": (1.0, 1.0), "shift": 0.0, "flip": 0.0, "jitter": 0.0}
SQUARE = np.uint8([[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 4, 0], [0, 0, 0, 0]])


def options(**fields):
    section = tiny("cmems").method
    section.update(fields)
    return section


def move(label, image=None, mirror=False, degrees=0.0, scale=1.0, shift=(0, 0)):
    image = label[..., None] / 4 if image is None else image
    of = synthesis.Move(
        jnp.asarray(mirror), jnp.deg2rad(degrees), jnp.float32(scale), jnp.float32(shift)
    )
    return jax.tree.map(np.asarray, synthesis.moved(of, jnp.asarray(image), jnp.asarray(label)))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, SQUARE),
        ({"shift": (1, -1)}, np.roll(SQUARE, (1, -1), (0, 1))),
        ({"degrees": 90}, np.rot90(SQUARE, -1)),
        ({"mirror": True}, SQUARE[:, ::-1]),
        # first mirrored, then rotated
        ({"mirror": True, "degrees": 90}, np.rot90(SQUARE[:, ::-1], -1)),
    ],
)
def test_moves_by_hand(how, expected):
    image, label = move(SQUARE, **how)
    np.testing.assert_array_equal(label, expected)
    np.testing.assert_allclose(image[..., 0] * (label > 0), expected / 4, atol=1e-5)


def test_twice_as_large():
    """About its own centre; the image between its pixels, the label the nearest pixel's."""
    image, label = move(SQUARE, scale=2.0)
    np.testing.assert_array_equal(label, np.kron([[1, 2], [3, 4]], np.ones((2, 2))))
    x, y = 0.75 + np.arange(4) / 2, np.arange(4)
    rows = np.stack([np.interp(x, y, column) for column in SQUARE.T / 4], 1)
    expected = np.stack([np.interp(x, y, row) for row in rows])
    np.testing.assert_allclose(image[..., 0], expected, atol=1e-5)


def test_nothing_comes_from_outside():
    _, label = move(np.full((4, 4), 2, np.uint8), shift=(2, -1))
    expected = np.full((4, 4), 2)
    expected[:2] = expected[:, 3:] = 0
    np.testing.assert_array_equal(label, expected)
    _, label = move(np.zeros((4, 4), np.uint8), scale=2.0, shift=(1, 1))
    assert not label.any()


def scene(batch=8, size=16):
    """Images that say where each pixel is from, with two organs; a background of another range."""
    places = np.stack(np.mgrid[:size, :size], -1) / 32
    label = np.zeros((batch, size, size), np.uint8)
    label[:, 4:8, 5:12], label[:, 8:11, 5:9] = 1, 2
    image = np.broadcast_to(places, (batch, size, size, 2))
    return jnp.asarray(image), jnp.asarray(label), jnp.ones((batch, size, size, 2))


@pytest.fixture(scope="module")
def paste():
    """paste(key, **options) of the scene; compiled once for both kinds of parts."""
    made = {}

    def run(key, **fields):
        name = tuple(fields.items())
        if name not in made:
            section = options(**fields)
            made[name] = jax.jit(
                lambda key: synthesis.copy_paste(key, *scene(), organs=2, options=section)
            )
        return jax.tree.map(np.asarray, made[name](jax.random.key(key)))

    return run


@pytest.mark.parametrize("per_organ", [False, True])
def test_image_and_label_move_together(paste, per_organ):
    """Where a pixel comes from, as its image says, its label was."""
    _, own, background = (np.asarray(x) for x in scene())
    image, label, pasted = paste(0, per_organ=per_organ, jitter=0.0, shift=0.3, rotation=90.0)
    np.testing.assert_array_equal(pasted, label > 0)
    np.testing.assert_array_equal(image[~pasted], background[~pasted])
    rows, columns = np.round(image[pasted] * 32).astype(int).T
    assert len(rows) > 100
    # A pixel halfway between two may have come from either.
    assert (own[0][rows, columns] == label[pasted]).mean() > 0.99
    assert len({x.tobytes() for x in label}) == len(label)  # each image by its own draw


def test_draws_follow_the_key(paste):
    fields = {"per_organ": False, "jitter": 0.0, "shift": 0.3, "rotation": 90.0}
    first, again, other = (paste(key, **fields) for key in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first[1] != other[1]).any()


def test_pasted_is_the_moved_foreground(paste):
    """A mirror image about the centre of mass; nothing else of the image arrives."""
    image, own, background = (np.asarray(x)[0] for x in scene())
    expected_image, expected = move(own, image, mirror=True)
    image, label, pasted = (x[0] for x in paste(2, **STILL | {"flip": 1.0}))
    np.testing.assert_array_equal(label, expected)
    np.testing.assert_array_equal(pasted, expected > 0)
    expected_image = np.where(pasted[..., None], expected_image, background)
    np.testing.assert_allclose(image, expected_image, atol=1e-5)


def test_later_organs_cover_earlier_ones(paste):
    """Twice as large, the two overlap; each covers the other in some images."""
    _, own, _ = (np.asarray(x)[0] for x in scene())
    whole = [move(np.where(own == k, own, 0), scale=2.0)[1] > 0 for k in (1, 2)]
    assert (whole[0] & whole[1]).any()
    _, labels, pasted = paste(3, **STILL | {"scale": (2.0, 2.0), "per_organ": True})
    on_top = []
    for label, where in zip(labels, pasted, strict=True):
        np.testing.assert_array_equal(where, whole[0] | whole[1])
        seen = [np.array_equal(label == k, whole[k - 1]) for k in (1, 2)]
        assert sum(seen) == 1
        on_top.append(seen.index(True))
    assert set(on_top) == {0, 1}


def test_draws_stay_in_their_ranges():
    section = options(rotation=30.0, scale=(0.5, 2.0), shift=0.25, flip=0.25)
    keys = jax.random.split(jax.random.key(0), 400)
    moves = jax.jit(jax.vmap(lambda key: synthesis.draw(key, (8, 16), section)))(keys)
    for values, least, greatest in (
        (jnp.rad2deg(moves.angle), -30, 30),
        (moves.scale, 0.5, 2),
        (moves.shift[:, 0], -2, 2),
        (moves.shift[:, 1], -4, 4),
    ):
        margin = 0.02 * (greatest - least)
        assert least <= values.min() < least + margin
        assert greatest - margin < values.max() <= greatest
    assert 0.18 < moves.mirror.mean() < 0.32


def test_views_by_hand():
    """On its own background what is left of the old organs does not count; on an unlabelled one
    only what was pasted is certain. One that has nothing pasted stays itself."""
    fields = {f"method.{name}": value for name, value in STILL.items()}
    fields |= {"batch.labelled": 8, "augment.flip": 0.0, "augment.rotate": 0.0}
    fields |= {"method.jitter_synthetic": False}
    method = train_step.make_method(tiny("cmems", **fields | {"method.scale": (0.5, 0.5)}))
    batch = jax.tree.map(jnp.asarray, tiny_batch(method.config, 4))
    batch["labelled"]["annotated"] = jnp.ones((8, 1, 1, 2), bool)
    batch["labelled"]["label"] = batch["labelled"]["label"].at[7].set(0)
    batch["unlabelled"]["image"] = batch["unlabelled"]["image"][:2] // jnp.array([1, 2])[
        :, None, None, None
    ].astype(jnp.uint16)
    batch = {k: v | {"image": augment.to_image(v["image"])} for k, v in batch.items()}
    # This key draws for rows 1 and 3 their own background, for 5 and 7 another.
    views = jax.jit(method.views)(batch, jax.random.key(10))
    source, weak, got = batch["labelled"], batch["unlabelled"]["image"], views["labelled"]
    assert got["annotated"].shape == (8, 1, 1, 2)
    for row in range(0, 8, 2):  # every other image stays
        np.testing.assert_array_equal(got["image"][row], source["image"][row])
        np.testing.assert_array_equal(got["label"][row], source["label"][row])
        assert views["certain"][row].all()
        assert views["counts"][row].all()
    for row, own in ((1, True), (3, True), (5, False), (7, True)):
        image, small = move(source["label"][row], source["image"][row], scale=0.5)
        pasted = small > 0
        assert pasted.any() == (row < 7)
        background = source["image"][row] if own else weak[1]  # the first is for rows 1 and 3
        np.testing.assert_array_equal(got["label"][row], small)
        expected = np.where(pasted[..., None], image, background)
        np.testing.assert_allclose(got["image"][row], expected, atol=1e-5)
        np.testing.assert_array_equal(views["certain"][row], pasted | own)
        left = own & (np.asarray(source["label"][row]) > 0) & ~pasted
        assert left.any() == (row in (1, 3))
        np.testing.assert_array_equal(views["counts"][row], ~left)


def test_pixels_near_what_was_pasted():
    mask = jnp.zeros((2, 6, 6), bool).at[0, 1, 2].set(True)
    expected = np.zeros((2, 6, 6), bool)
    expected[0, :4, :5] = True
    np.testing.assert_array_equal(cmems.near(mask, 2), expected)
    assert cmems.near(mask, 0).all()


def test_organs_change_sides_only_where_images_do():
    assert train_step.make_method(tiny("cmems")).paste.flip == 0.5
    assert train_step.make_method(tiny("cmems", **{"augment.flip": 0.0})).paste.flip == 0.0
