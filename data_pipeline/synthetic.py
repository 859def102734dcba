"""Draws synthetic faces: identities that differ in their features, images that differ in pose, expression, light and background.

Nobody is depicted. The faces let the whole stack be run and tested where no real faces may be.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from data_pipeline import SIDE
from data_pipeline.errors import DataError
from data_pipeline.output import new_folder, replace_file

_SCALE = 2  # drawn at twice the size and averaged down: smooth edges
FOLDER_NAME = re.compile(r"id_\d{5,}")  # of an identity, see face_name
_ANGLES = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_Pair = tuple[float, float]
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)

# hue families as RGB; an identity mixes two neighbours of a row
_SKIN = np.array([[250, 224, 200], [236, 196, 160], [214, 165, 122], [176, 122, 82], [132, 86, 58], [88, 58, 42]], float)
_HAIR = np.array([[24, 20, 20], [62, 40, 28], [112, 72, 40], [176, 128, 66], [222, 192, 130], [156, 62, 30], [150, 150, 152]], float)
_FRAME = np.array([40, 36, 36])  # of glasses
_EYES = np.array([[50, 32, 22], [96, 62, 34], [98, 112, 62], [72, 122, 150], [110, 118, 126]], float)


@dataclass(frozen=True)
class _Face:
    """The fixed features of one identity. Lengths in face units: the face is about 2 wide; x to the right, y down."""

    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    lips: np.ndarray
    width: float  # half the face's width
    jaw: float  # how square the jaw is
    chin: float  # length of the lower face
    eye_gap: float
    eye_y: float
    eye_size: float
    eye_round: float
    eye_tilt: float
    brow_y: float
    brow_thick: float
    brow_tilt: float
    nose_long: float
    nose_wide: float
    mouth_y: float
    mouth_wide: float
    lip_thick: float
    hairline: float
    hair_volume: float
    hair_length: float  # of the sides, 0: cropped
    parting: float  # where the fringe is longest, -1 left to 1 right
    fringe: float
    beard: float  # 0: none
    glasses: int  # 0: none, 1: round, 2: square
    moles: np.ndarray  # [k, 2]


def _identity(seed: int, identity: int) -> _Face:
    rng = np.random.default_rng((seed, identity))

    def mixed(colours: np.ndarray) -> np.ndarray:
        place = rng.uniform(0, len(colours) - 1)
        low = int(place)
        return colours[low] + (place - low) * (colours[low + 1] - colours[low]) + rng.normal(0, 6, 3)

    skin, hair, iris = mixed(_SKIN), mixed(_HAIR), mixed(_EYES)
    lips = skin * rng.uniform(0.62, 0.9, 3) * np.array([1.12, 0.82, 0.85])
    u = rng.uniform
    return _Face(
        skin, hair, iris, lips, width=u(0.82, 1.08), jaw=u(0.0, 0.3), chin=u(1.12, 1.4), eye_gap=u(0.34, 0.5), eye_y=u(-0.2, 0.02),
        eye_size=u(0.14, 0.23), eye_round=u(0.42, 0.8), eye_tilt=u(-0.25, 0.25), brow_y=u(0.2, 0.34), brow_thick=u(0.03, 0.1),
        brow_tilt=u(-0.3, 0.3), nose_long=u(0.36, 0.58), nose_wide=u(0.11, 0.24), mouth_y=u(0.62, 0.8), mouth_wide=u(0.26, 0.46),
        lip_thick=u(0.05, 0.12), hairline=u(-0.98, -0.6), hair_volume=u(0.04, 0.3), hair_length=u(0, 1.5) * (u() < 0.6), parting=u(-1, 1),
        fringe=u(0, 0.45), beard=u(0.4, 1) * (u() < 0.2), glasses=int(rng.choice([0, 0, 0, 1, 2])),
        moles=rng.uniform((-0.65, -0.1), (0.65, 0.85), (rng.integers(0, 3), 2)),
    )  # fmt: skip


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


class _Canvas:
    """Polygons and strokes in face units, turned, scaled and shifted; yaw and pitch move what stands out of the face (``depth``)."""

    def __init__(self, background: np.ndarray, rng: np.random.Generator) -> None:
        side = SIDE * _SCALE
        self.image = Image.new("RGB", (side, side), _rgb(background))
        self._draw = ImageDraw.Draw(self.image)
        self._size = side * 0.36 * rng.uniform(0.94, 1.06)  # pixels per face unit
        self._matrix = self._size * _turn(rng.normal(0, 0.06))
        self._origin = side * (np.array([0.5, 0.49]) + rng.uniform(-0.025, 0.025, 2))
        self._parallax = rng.uniform(-1, 1, 2) * (0.12, 0.07) @ self._matrix  # what yaw and pitch move at depth 1, in pixels

    def polygon(self, points: np.ndarray, colour: np.ndarray, *, depth: float = 0.0) -> None:
        """``points`` [n, 2]. ``depth``: how far in front of the head's axis, 1 for the eyes."""
        self._draw.polygon(self._placed(points, depth), fill=_rgb(colour))

    def ellipse(self, centre: _Pair, radii: _Pair, colour: np.ndarray, *, tilt: float = 0.0, depth: float = 0.0) -> None:
        points = _CIRCLE * radii
        if tilt:
            points = points @ _turn(tilt)
        self.polygon(points + centre, colour, depth=depth)

    def stroke(self, points: np.ndarray, colour: np.ndarray, thick: float, *, depth: float = 0.0) -> None:
        self._draw.line(self._placed(points, depth), fill=_rgb(colour), width=max(1, round(thick * self._size)), joint="curve")

    def _placed(self, points: np.ndarray, depth: float) -> list[float]:
        return (points @ self._matrix + (self._origin + depth * self._parallax)).ravel().tolist()


def draw_face(seed: int, identity: int, image: int) -> np.ndarray:
    """[112, 112, 3] uint8 RGB: image number ``image`` of ``identity``. The three numbers alone decide every pixel.

    Across images of one identity: position +-3 px, turn about 3 degrees, scale +-6 %, yaw and pitch as parallax, expression, gaze, a
    light from a random side, exposure and colour of the light, background, clothes, sensor noise.
    """
    face = _identity(seed, identity)
    rng = np.random.default_rng((seed, identity, image, 1))  # the 1: numpy ignores trailing zeros, and image 0 is not the identity
    canvas = _Canvas(rng.uniform(20, 235, 3), rng)
    _draw_head(canvas, face, rng)
    _draw_eyes(canvas, face, rng)
    _draw_nose_and_mouth(canvas, face, rng)
    _draw_fringe(canvas, face)
    pixels = np.asarray(canvas.image.reduce(_SCALE), np.float32)
    return _lit(pixels, rng)


def _draw_head(canvas: _Canvas, face: _Face, rng: np.random.Generator) -> None:
    shade = face.skin * 0.8
    canvas.polygon(np.array([[-2, 2.2], [-0.9, 1.35], [0.9, 1.35], [2, 2.2]]), rng.uniform(20, 235, 3))  # clothes
    if face.hair_length:
        canvas.ellipse((0, 0.1), (face.width + face.hair_volume + 0.08, 0.75 + face.hair_length), face.hair * 0.8)
    canvas.polygon(np.array([[-0.42, 0.7], [0.42, 0.7], [0.5, 1.6], [-0.5, 1.6]]), shade)
    canvas.ellipse((0, -0.3), (face.width + face.hair_volume, 0.88 + face.hair_volume), face.hair)
    for side in (-1, 1):
        canvas.ellipse((side * face.width, 0.08), (0.13, 0.24), shade)
    canvas.polygon(_outline(face, 1.0), face.skin)
    if face.beard:
        lower = _outline(face, 1.0)
        lower = lower[lower[:, 1] > 0.2]
        canvas.polygon(lower, face.skin + 0.75 * face.beard * (face.hair - face.skin))
        canvas.ellipse((0, 0.3), (face.width * 0.62, 0.42), face.skin, depth=0.5)


def _outline(face: _Face, size: float) -> np.ndarray:
    x, y = _CIRCLE.T
    down = np.clip(y, 0, 1)
    wide = face.width * (1 + face.jaw * down * (1 - down) * 2) * size
    return np.stack([wide * np.sign(x) * np.abs(x) ** (1 - face.jaw * 0.6), np.where(y > 0, y * face.chin, y * 1.02) * size], axis=1)


def _draw_eyes(canvas: _Canvas, face: _Face, rng: np.random.Generator) -> None:
    open_, gaze, raised = rng.uniform(0.55, 1.1), rng.uniform(-0.3, 0.3), rng.normal(0, 0.03)
    brow = face.hair * 0.75
    for side in (-1, 1):
        x, y, size = side * face.eye_gap, face.eye_y, face.eye_size
        tall = size * face.eye_round * open_
        canvas.ellipse((x, y - 0.02), (size * 1.18, tall * 1.35), face.skin * 0.86, tilt=side * face.eye_tilt, depth=1)
        canvas.ellipse((x, y), (size, tall), np.array([242, 240, 236]), tilt=side * face.eye_tilt, depth=1)
        iris = min(tall, size * 0.52)
        canvas.ellipse((x + gaze * size, y), (iris, iris), face.iris, depth=1)
        canvas.ellipse((x + gaze * size, y), (iris * 0.45, iris * 0.45), np.array([12, 10, 10]), depth=1)
        line = np.array([[-1.3, 0.3 * side * face.brow_tilt], [0, -0.28], [1.3, -0.3 * side * face.brow_tilt]]) * (size, 0.22)
        canvas.stroke(line + np.array([x, y - face.brow_y - raised]), brow, face.brow_thick, depth=1)
        if face.glasses:
            rim = np.take(_CIRCLE, range(len(_CIRCLE) + 1), axis=0, mode="wrap")
            rim = rim * 0.3 if face.glasses == 1 else np.clip(rim * 1.5, -1, 1) * (0.31, 0.22)
            canvas.stroke(rim + np.array([x, y]), _FRAME, 0.035, depth=1.2)
    if face.glasses:
        inner = face.eye_gap - 0.3
        canvas.stroke(np.array([[-inner, face.eye_y], [inner, face.eye_y]]), _FRAME, 0.035, depth=1.2)


def _draw_nose_and_mouth(canvas: _Canvas, face: _Face, rng: np.random.Generator) -> None:
    tip, wide = face.eye_y + face.nose_long, face.nose_wide
    canvas.stroke(np.array([[0.06, face.eye_y + 0.08], [wide * 0.8, tip], [0, tip + 0.05]]), face.skin * 0.78, 0.035, depth=1.5)
    for side in (-1, 1):
        canvas.ellipse((side * wide * 0.6, tip), (wide * 0.32, 0.035), face.skin * 0.55, depth=1.5)
    smile, gape = rng.uniform(-0.05, 0.14), max(0.0, rng.uniform(-0.1, 0.14))
    x = np.linspace(-1, 1, 9)
    wide, bow = face.mouth_wide * (1 + smile), 1 - x**2
    middle = np.stack([x * wide, face.mouth_y + smile * bow - smile * 0.5], axis=1)
    for up, down, colour in ((0.8 * face.lip_thick, 1.1 * face.lip_thick, face.lips), (0.012, 0.012, face.lips * 0.35)):
        up, down = ((gape * 0.5 + thick) * bow[:, None] * (0, 1) for thick in (up, down))
        canvas.polygon(np.concatenate([middle - up, (middle + down)[::-1]]), colour, depth=1)
    for mole in face.moles:
        canvas.ellipse(tuple(mole), (0.035, 0.035), face.skin * 0.45, depth=0.8)


def _draw_fringe(canvas: _Canvas, face: _Face) -> None:
    x = np.linspace(-1, 1, 11)
    down = face.hairline + face.fringe * (1 - np.abs(x - face.parting) / 2) + 0.25 * x**2
    top = np.stack([x * (face.width + face.hair_volume * 0.9), -0.3 - (0.86 + face.hair_volume) * np.sqrt(1 - x**2 * 0.98)], axis=1)
    canvas.polygon(np.concatenate([np.stack([x * face.width, down], axis=1), top[::-1]]), face.hair, depth=0.3)


def _lit(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light from one side, exposure, colour of the light, noise: [112, 112, 3] float32 -> uint8."""
    across = np.linspace(-1, 1, SIDE, dtype=np.float32)
    side, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.38)
    light = 1 + strength * (math.cos(side) * across[None, :] + math.sin(side) * across[:, None])  # Python floats keep it float32
    pixels = pixels * light[:, :, None]
    pixels *= (rng.uniform(0.72, 1.18) * rng.uniform(0.93, 1.07, 3)).astype(np.float32)
    noise = rng.standard_normal(pixels.shape, np.float32)
    noise *= rng.uniform(2, 9)
    pixels += noise
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    return tuple(min(255, max(0, int(value))) for value in colour.tolist())


def face_name(identity: int) -> str:
    """The folder of an identity: ``id_00042``. Its image number i (from 0) is the file ``id_00042/id_00042_%04d.jpg`` % (i + 1)."""
    return f"id_{identity:05d}"


def write_synthetic(
    out: Path,
    identities: int,
    images_per_identity: int,
    seed: int,
    first_identity: int = 0,
    *,
    force: bool = False,
    progress: bool = False,
) -> None:
    """Draw ``<out>/id_00000/id_00000_0001.jpg`` and so on (LFW's naming: image numbers count from 1), JPEG quality 80 to 95.

    Identities ``first_identity`` to ``first_identity + identities - 1``: two sets of one seed whose ranges are apart share nobody.
    ``out`` appears when it is complete, or not at all (``output.new_folder``). Raises ``DataError`` when it exists (without ``force``),
    or a count is not positive.
    """
    _check_counts(identities, images_per_identity, seed, first_identity)
    total = identities * images_per_identity
    with new_folder(out, FOLDER_NAME, force=force) as folder, tqdm(total=total, unit="img", file=sys.stderr, disable=not progress) as bar:
        for identity in range(first_identity, first_identity + identities):
            name = face_name(identity)
            (folder / name).mkdir()
            for image in range(images_per_identity):
                quality = int(np.random.default_rng((seed, identity, image, 2)).integers(80, 96))
                pixels = Image.fromarray(draw_face(seed, identity, image))
                pixels.save(folder / name / f"{name}_{image + 1:04d}.jpg", quality=quality)
                bar.update()


def write_pairs(
    path: Path, identities: int, images_per_identity: int, folds: int, pairs_per_fold: int, seed: int, first_identity: int = 0
) -> None:
    """Write verification pairs over a set of ``write_synthetic`` in LFW's format, tab-separated.

    First line ``folds  pairs_per_fold``; then per fold ``pairs_per_fold`` lines ``name i j`` (one person) and as many
    ``name1 i name2 j`` (two). No pair comes twice, and no identity is in two folds. Raises ``DataError`` when the set is too small.
    """
    _check_counts(identities, images_per_identity, seed, first_identity)
    mine = identities // max(folds, 1)
    matched, mismatched = mine * (images_per_identity * (images_per_identity - 1) // 2), mine * (mine - 1) // 2 * images_per_identity**2
    if min(folds, pairs_per_fold) < 1 or pairs_per_fold > min(matched, mismatched):
        raise DataError(
            f"{path}: {folds} folds of {pairs_per_fold} + {pairs_per_fold} pairs: of {identities} identities a fold has {mine} for itself, "
            f"which make {matched} matched and {mismatched} mismatched pairs of {images_per_identity} images each; use fewer folds or pairs"
        )
    rng = np.random.default_rng((seed, first_identity, identities, 3))
    order = rng.permutation(identities) + first_identity
    lines = [f"{folds}\t{pairs_per_fold}"]
    for fold in range(folds):
        people = order[fold * mine : (fold + 1) * mine]
        same: set[str] = set()
        while len(same) < pairs_per_fold:
            i, j = sorted(rng.choice(images_per_identity, 2, replace=False) + 1)
            same.add(f"{face_name(rng.choice(people))}\t{i}\t{j}")
        other: set[str] = set()
        while len(other) < pairs_per_fold:
            one, two = sorted(rng.choice(people, 2, replace=False))
            i, j = rng.integers(1, images_per_identity + 1, 2)
            other.add(f"{face_name(one)}\t{i}\t{face_name(two)}\t{j}")
        lines += [*sorted(same), *sorted(other)]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "\n".join(lines) + "\n")


def _check_counts(identities: int, images_per_identity: int, seed: int, first_identity: int) -> None:
    least = {"identities": (identities, 1), "images": (images_per_identity, 1), "seed": (seed, 0), "first identity": (first_identity, 0)}
    for name, (value, low) in least.items():
        if value < low:
            raise DataError(f"{name}: must be at least {low}, got {value}")
