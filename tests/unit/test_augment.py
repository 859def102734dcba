"""Every change of the training images against a reference in float64, and what is drawn for an image."""

from dataclasses import asdict, fields
from functools import cache

import numpy as np
import pytest
from PIL import Image

from data_pipeline.augment import NUM_DRAWS, Augment
from data_pipeline.errors import DataError
from data_pipeline.loader import FaceLoader
from data_pipeline.order import uniforms
from tests.unit.loading import ALL, take
from tests.unit.record_sets import jpeg, write_records
from train.config import AugmentConfig

SEED = 3
GREY = 127
ROWS = uniforms(0, 0, np.arange(20_000), NUM_DRAWS)
CHOSEN = ("downscale", "blur", "color", "gray", "erase", "flip")  # changes that have a probability


def seen(face_set, augment, batches=20, batch_size=12):
    """(face as stored, as the loader shows it, what was drawn for it) of many images; pixels [112, 112, 3] float64, whole grey levels."""
    folder, faces = face_set
    for batch in take(FaceLoader(folder, batch_size, augment=augment, seed=SEED, num_threads=1), batches):
        levels = batch.images.numpy().astype(np.float64).transpose(0, 2, 3, 1) * 127.5 + 127.5
        shown = np.rint(levels)
        assert np.abs(levels - shown).max() < 1e-4
        start = (batch.step - 1) * batch_size % len(faces)
        drawn = augment.draw(uniforms(SEED, batch.epoch, np.arange(start, start + batch_size), NUM_DRAWS))
        for i, label in enumerate(batch.labels.tolist()):
            yield faces[label].astype(np.float64), shown[i], {name: values[i] for name, values in drawn.items()}


def filtered(face, weights):
    """``weights`` [n, 112] along both axes."""
    return np.einsum("yi,xj,ijc->yxc", weights, weights, face, optimize=True)


@cache
def triangles(found, wanted):
    """[wanted, found]: linear interpolation, over all pixels that a smaller one covers; those beyond the edge are as at the edge."""
    scale = found / wanted
    reach = max(scale, 1.0)
    weights = np.zeros((wanted, found))
    for row, centre in zip(weights, (np.arange(wanted) + 0.5) * scale - 0.5, strict=True):
        for i in range(int(np.floor(centre - reach)), int(np.ceil(centre + reach)) + 1):
            row[np.clip(i, 0, found - 1)] += max(0.0, 1 - abs(i - centre) / reach)
    return weights / weights.sum(1, keepdims=True)


def downscale(face, drawn):
    side = int(drawn["downscale_px"])
    return filtered(np.rint(filtered(face, triangles(112, side))), triangles(side, 112))


@cache
def gaussian(radius):
    """[112, 112]: the sigma that DALI documents for a window, mirrored at the edge."""
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * ((radius - 1) * 0.3 + 0.8) ** 2))
    weights = np.zeros((112, 112))
    for row in range(112):
        for i, weight in zip(range(row - radius, row + radius + 1), kernel / kernel.sum(), strict=True):
            weights[row, 111 - abs(111 - abs(i))] += weight
    return weights


def blur(face, drawn):
    return filtered(face, gaussian(int(drawn["blur_window"] - 1) // 2))


def color(face, drawn):
    """Turned and stretched around the grey axis of YIQ."""
    yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    angle, saturation = np.deg2rad(float(drawn["hue"])), float(drawn["saturation"])
    turn = np.array([[1, 0, 0], [0, np.cos(angle), np.sin(angle)], [0, -np.sin(angle), np.cos(angle)]]) * [[1], [saturation], [saturation]]
    return np.clip(face @ (np.linalg.inv(yiq) @ turn @ yiq).T, 0, 255)


def gray(face, drawn):
    return np.repeat(face @ [[0.299], [0.587], [0.114]], 3, axis=2)


def brightness(face, drawn):
    return np.clip(face * float(drawn["brightness"]), 0, 255)


def shift(face, drawn):
    """``drawn["shift"]``: the pixel of the face that comes to the upper left corner."""
    down, right = drawn["shift"]
    grey = np.pad(face, ((6, 6), (6, 6), (0, 0)), constant_values=GREY)
    return grey[6 + down :, 6 + right :][:112, :112]


def erase(face, drawn):
    (top, left), (height, width) = drawn["erase_anchor"].astype(int), drawn["erase_shape"].astype(int)
    face = face.copy()
    face[top : top + height, left : left + width] = GREY
    return face


def flip(face, drawn):
    return face[:, ::-1]


# Results are rounded; DALI's weights of an enlarged image and of a luma are rounded, too.
@pytest.mark.parametrize(
    ("change", "tolerance"),
    [(downscale, 1.5), (blur, 0.501), (color, 0.501), (gray, 0.505), (erase, 0.0), (flip, 0.0)],
)
def test_a_change_is_its_reference_at_its_probability_and_other_images_are_untouched(face_set, change, tolerance):
    name = change.__name__
    images = changed = 0
    for face, shown, drawn in seen(face_set, Augment(**{"flip": 0.0, name: 0.4}), batches=10):
        if drawn[name]:
            assert np.abs(shown - change(face, drawn)).max() <= tolerance
        else:
            assert np.array_equal(shown, face)
        images += 1
        changed += not np.array_equal(shown, face)
    assert abs(changed - 0.4 * images) < 4 * (images * 0.4 * 0.6) ** 0.5


def test_brightness_scales_every_image_by_its_own_factor(face_set):
    factors = set()
    for face, shown, drawn in seen(face_set, Augment(flip=0.0, brightness=0.3)):
        assert np.abs(shown - brightness(face, drawn)).max() <= 0.501  # rounded
        dark = (face > 0) & (face < 255 / 1.4)
        factors.add(float(shown[dark].sum() / face[dark].sum()))
    assert 0.695 < min(factors) < 0.75
    assert 1.25 < max(factors) < 1.305


def test_shift_moves_whole_pixels_up_to_the_limit_and_fills_grey(face_set):
    """Without what was drawn: one of the 25 moves explains the image, and each of them is found."""
    moves = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    found = []
    for face, shown, _ in seen(face_set, Augment(flip=0.0, shift_px=2), batches=16):
        (move,) = [move for move in moves if np.array_equal(shown, shift(face, {"shift": move}))]
        found.append(move)
    assert set(found) == set(moves)


def test_a_gray_image_keeps_its_luma_and_loses_its_color(face_set):
    for face, shown, _ in seen(face_set, Augment(flip=0.0, gray=1.0), batches=2):
        luma = np.asarray(Image.fromarray(face.astype(np.uint8)).convert("L"), float)
        assert np.abs(shown - luma[:, :, None]).max() <= 1  # Pillow truncates
        assert (shown == shown[:, :, :1]).all()


def test_one_grey_rectangle_of_the_stated_size_is_erased_anywhere(face_set):
    """Without what was drawn: the box around all pixels that differ is grey as a whole."""
    areas, aspects, places = [], [], []
    for face, shown, _ in seen(face_set, Augment(flip=0.0, erase=1.0)):
        rows, columns = ((shown != face).any(axis=(2, axis)).nonzero()[0] for axis in (1, 0))
        (top, height), (left, width) = ((side[0], np.ptp(side) + 1) for side in (rows, columns))
        assert (shown[top : top + height, left : left + width] == GREY).all()
        areas.append(height * width / 112**2)
        aspects.append(height / width)
        places += [top / (112 - height), left / (112 - width)]
    assert 0.018 < min(areas) < 0.03  # a side of 9 pixels or more is rounded by half a pixel
    assert 0.17 < max(areas) < 0.21
    assert 0.28 < min(aspects) < 0.4
    assert 2.5 < max(aspects) < 3.6
    assert (min(places), max(places)) == (0, 1)
    assert abs(np.mean(places) - 0.5) < 4 / (12 * len(places)) ** 0.5
    assert abs(np.mean(areas) - 0.11) < 4 * 0.18 / (12 * len(areas)) ** 0.5


def test_changes_are_made_in_the_order_that_is_stated(face_set):
    together = Augment(downscale=0.7, blur=0.7, color=0.7, gray=0.3, brightness=0.3, shift_px=6, erase=0.7, flip=0.7)
    for face, shown, drawn in seen(face_set, together, batches=4):
        expected = face
        for change in (downscale, blur, color, gray, brightness, shift, erase, flip):
            if change in (brightness, shift) or drawn[change.__name__]:
                expected = np.rint(change(expected, drawn))
        assert np.abs(shown - expected).max() <= 4  # the two levels by which `downscale` may differ, colored by 1.5 and brightened by 1.3


def test_ranks_draw_for_themselves(tmp_path):
    """Two ranks see one image only, again and again, and mirror it in their own way."""
    write_records(tmp_path / "train.rec", [(key, 0.0, jpeg()) for key in range(32)])
    flips = []
    for rank in range(2):
        batches = take(FaceLoader(tmp_path, 16, rank=rank, world_size=2), 4)
        flips.append([bool(image[0, 50, 5] > image[0, 50, 100]) for batch in batches for image in batch.images])
    assert flips[0] != flips[1]


def test_random_numbers_depend_on_seed_epoch_and_position_alone():
    positions = np.array([7, 3, 19_999, 4])
    assert np.array_equal(uniforms(0, 0, positions, NUM_DRAWS), ROWS[positions])
    assert np.array_equal(uniforms(0, 0, positions, 3), ROWS[positions, :3])
    for other in (
        uniforms(1, 0, positions, NUM_DRAWS),
        uniforms(0, 1, positions, NUM_DRAWS),
        uniforms(0, 0, positions + 20_000, NUM_DRAWS),
    ):
        assert not np.isin(other, ROWS[positions]).any()


def test_what_is_drawn_for_an_image_depends_on_its_row_alone():
    whole = ALL.draw(ROWS[:100])
    for name, values in ALL.draw(ROWS[40:47]).items():
        assert np.array_equal(values, whole[name][40:47])


def test_what_a_change_draws_depends_on_no_other_change():
    together = ALL.draw(ROWS[:100])
    names = set()
    for field in fields(Augment):
        alone = Augment(**{"flip": 0.0, field.name: getattr(ALL, field.name)}).draw(ROWS[:100])
        for name, values in alone.items():
            assert np.array_equal(values, together[name])
        names |= alone.keys()
    assert names == together.keys()


def test_whatever_is_drawn_is_independent_of_everything_else():
    """Of any two things drawn for 20,000 images the correlation is that of chance: a standard deviation of 1 / sqrt(20,000)."""
    drawn = Augment(**dict.fromkeys(CHOSEN, 0.3), brightness=0.3, shift_px=6).draw(ROWS)
    for name in CHOSEN:
        assert abs(drawn[name].sum() - 0.3 * len(ROWS)) < 4 * (len(ROWS) * 0.3 * 0.7) ** 0.5
    shape, anchor = drawn.pop("erase_shape"), drawn.pop("erase_anchor")
    columns = [shape.prod(axis=1), np.log(shape[:, 0] / shape[:, 1]), *(anchor / (112 - shape)).T, *drawn.pop("shift").T, *drawn.values()]
    assert len(columns) == NUM_DRAWS
    correlations = np.corrcoef(np.array(columns, float)) - np.eye(NUM_DRAWS)
    assert np.abs(correlations).max() < 4.5 / len(ROWS) ** 0.5


def test_arguments_are_uniform_in_their_ranges():
    drawn = Augment(**dict.fromkeys(CHOSEN, 1.0), brightness=0.3, shift_px=6).draw(ROWS)
    for name, choices in (
        ("downscale_px", range(56, 90)),
        ("blur_window", (3, 5)),
        ("shift", [(down, right) for down in range(-6, 7) for right in range(-6, 7)]),
    ):
        values, counts = np.unique(drawn[name], axis=0, return_counts=True)
        assert [tuple(value) if value.ndim else value for value in values] == list(choices)
        share = 1 / len(choices)
        assert np.abs(counts - len(ROWS) * share).max() < 4.5 * (len(ROWS) * share * (1 - share)) ** 0.5  # of 169 moves few reach 4 sigma
    for name, low, high in (("brightness", 0.7, 1.3), ("hue", 0.0, 20.0), ("saturation", 1.0, 1.2)):
        found, counts = np.histogram(drawn[name], bins=20, range=(low - 1e-6, high + 1e-6))[0], len(ROWS) / 20
        assert found.sum() == len(ROWS)
        assert np.abs(found - counts).max() < 4 * counts**0.5
    area, aspect = drawn["erase_shape"].prod(axis=1) / 112**2, np.log(np.divide(*drawn["erase_shape"].T))
    assert abs(area.mean() - 0.11) < 4 * 0.18 / (12 * len(ROWS)) ** 0.5 + 0.0005  # sides are rounded
    assert abs(aspect.mean()) < 4 * 2 * np.log(1 / 0.3) / (12 * len(ROWS)) ** 0.5 + 0.0005


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extremes_of_the_random_numbers_stay_within_the_ranges(uniform):
    drawn = Augment(**dict.fromkeys(CHOSEN, 1.0), brightness=0.3, shift_px=6).draw(np.full((1, NUM_DRAWS), uniform))
    first = uniform == 0
    assert drawn["shift"].tolist() == [[-6, -6] if first else [6, 6]]
    assert drawn["downscale_px"] == (56 if first else 89)
    assert drawn["blur_window"] == (3 if first else 5)
    (top, left), (height, width) = drawn["erase_anchor"][0], drawn["erase_shape"][0]
    assert (top, left) == ((0, 0) if first else (112 - height, 112 - width))
    assert all(drawn[name].all() for name in CHOSEN)
    assert not any(Augment(**dict.fromkeys(CHOSEN, 1e-300)).draw(np.full((1, NUM_DRAWS), 0.5))[name].any() for name in CHOSEN)


def test_what_is_switched_off_is_not_drawn():
    assert Augment(flip=0.0).draw(ROWS[:3]) == {}
    assert list(Augment().draw(ROWS[:3])) == ["flip"]


@pytest.mark.parametrize("name", [field.name for field in fields(Augment)])
def test_values_out_of_range_are_refused_by_name(name):
    for value in (-0.1, float("nan"), 57 if name == "shift_px" else 1.01):
        with pytest.raises(DataError, match=rf"^augment\.{name}: must lie in \[0, (1|56)\], got {value}"):
            Augment(**{name: value})


def test_the_recipe_has_the_same_changes_with_the_same_defaults():
    assert AugmentConfig().model_dump() == asdict(Augment())
