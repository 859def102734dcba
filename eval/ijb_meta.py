"""What the field's IJB-B and IJB-C release says of images, templates and subjects: the files in its folder ``meta``."""

import csv
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.names import is_plain_name
from eval.align import aligns
from eval.errors import EvalError
from eval.images import FaceImages, read_image

GALLERIES = {"IJBC": ("G1", "G2"), "IJBB": ("S1", "S2")}  # target -> the names of its two galleries
MAX_DIGITS = 18  # of a number in these files: it fits into int64


@dataclass(frozen=True)
class IjbTemplates:
    """T templates, each of one or more of n images. A membership is an image in a template; there are m, sorted by template and media."""

    images: FaceImages  # n, with landmarks
    scores: np.ndarray  # [n] float64 of the face detector, not negative
    ids: np.ndarray  # [T] int64, as the files number the templates, ascending
    image: np.ndarray  # [m] int64, number of the image
    template: np.ndarray  # [m] int64, position in ``ids``, ascending; every position occurs
    media: np.ndarray  # [m] int64, ascending in a template; images of one media are frames of one video, or one still picture
    unused: int = 0  # images with landmarks that are in no template; not among ``images``

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Positions of template ids in ``ids``; -1 for a template without images."""
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[at] == ids, at, -1)


@dataclass(frozen=True)
class Subjects:
    """Who is in templates: a gallery, or the probes."""

    name: str  # such as G1
    templates: np.ndarray  # [k] int64, positions in ``IjbTemplates.ids``, ascending and distinct
    subjects: np.ndarray  # [k] int64


@dataclass(frozen=True)
class Search:
    """The 1:N protocol: probes that are searched for in two galleries."""

    galleries: tuple[Subjects, Subjects]
    probes: Subjects


def meta_file(root: Path, target: str, name: str) -> Path:
    """``ROOT/meta/ijbc_NAME``. Raises EvalError when it is not there."""
    path = root / "meta" / f"{target.lower()}_{name}"
    if not path.is_file():
        raise EvalError(f"{path}: no such file; --data names the folder of {target} that holds meta and loose_crop")
    return path


def read_templates(root: Path, target: str) -> IjbTemplates:
    """Read ``face_tid_mid.txt`` (lines ``image template media``) and ``name_5pts_score.txt`` (``image``, five times ``x y``, ``score``).

    Fields are parted by white space, images are files of ``ROOT/loose_crop`` and are matched by name. An image may be in several
    templates. Every file is looked for, none opened.
    Raises: EvalError that names file and line for a missing file, a line of another form, an image twice in a template or without
        landmarks, landmarks that place no face (``eval.align.aligns``), or a score that is negative or not finite.
    """
    path, points = (meta_file(root, target, f"{name}.txt") for name in ("face_tid_mid", "name_5pts_score"))
    places, landmarks, scores = _read_landmarks(points)
    crops = root / "loose_crop"
    try:
        present = set(os.listdir(crops))
    except OSError as error:
        raise EvalError(f"{crops}: no readable folder of images: {error}") from error
    names: dict[str, int] = {}
    columns = array("q")  # image, template, media of each line
    for line, fields in _lines(path, 3, "image template media"):
        name = fields[0]
        if name not in names:
            if name not in places:
                raise EvalError(f"{path}, line {line}: no landmarks for {name!r}; expected a line of it in {points.name}")
            if name not in present:
                raise EvalError(f"{crops / name}: no such image (asked for by {path}, line {line})")
            names[name] = len(names)
        columns.extend((names[name], number(path, line, fields[1], "a template"), number(path, line, fields[2], "a media")))
    image, template, media = np.array(columns, dtype=np.int64).reshape(-1, 3).T
    _refuse_repeated(path, image, template, list(names))
    ids, position = np.unique(template, return_inverse=True)
    order = np.lexsort((image, media, position))
    paths = [os.path.join(crops, name) for name in names]  # hundreds of thousands: a Path each would take seconds
    at = np.array([places[name] for name in names])
    return IjbTemplates(
        images=FaceImages(paths, lambda image: read_image(paths[image]), landmarks[at]),
        scores=scores[at],
        ids=ids,
        image=image[order],
        template=position[order],
        media=media[order],
        unused=len(places) - len(paths),
    )


def read_search(root: Path, target: str, templates: IjbTemplates) -> Search:
    """Read the two galleries and ``1N_probe_mixed.csv``: a header, then lines that begin with ``template,subject,``; one for each image.

    Raises: EvalError that names file and line for a missing file, a line of another form, a template without images or of two subjects,
        a subject with two templates in a gallery, or a probe that is also in a gallery.
    """
    paths = {name: meta_file(root, target, f"1N_gallery_{name}.csv") for name in GALLERIES[target]}
    paths["probes"] = meta_file(root, target, "1N_probe_mixed.csv")
    first, second, probes = (_read_subjects(path, name, templates) for name, path in paths.items())
    for gallery in (first, second):
        subjects, counts = np.unique(gallery.subjects, return_counts=True)
        if counts.max() > 1:
            subject = subjects[np.argmax(counts)]
            twice = templates.ids[gallery.templates[gallery.subjects == subject]].tolist()
            raise EvalError(f"{paths[gallery.name]}: subject {subject} has {len(twice)} templates, {twice[:5]}; expected one in a gallery")
        both = np.intersect1d(gallery.templates, probes.templates)
        if len(both):
            raise EvalError(
                f"{paths['probes']}: template {templates.ids[both[0]]} is in {paths[gallery.name].name} too: it would find itself"
            )
    return Search((first, second), probes)


def number(path: Path, line: int, field: str, what: str) -> int:
    """A field that must be a number without sign. Raises: EvalError."""
    if not (field.isascii() and field.isdigit() and len(field) <= MAX_DIGITS):
        raise EvalError(f"{path}, line {line}: expected the number of {what}, found {field[:40]!r}")
    return int(field)


def _read_landmarks(path: Path) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """Name of an image -> its line, counted from 0; landmarks [lines, 5, 2] float32, as the field reads them; scores [lines] float64."""
    places: dict[str, int] = {}
    numbers = array("d")
    form = "image x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 score"
    for line, (name, *fields) in _lines(path, 12, form):
        if not is_plain_name(name):
            raise EvalError(f"{path}, line {line}: {name[:80]!r} can't be the name of an image in loose_crop")
        if places.setdefault(name, line - 1) != line - 1:
            raise EvalError(f"{path}, line {line}: image {name!r} again, first in line {places[name] + 1}; expected each once")
        try:
            numbers.extend(map(float, fields))
        except ValueError as error:
            raise EvalError(f"{path}, line {line}: expected {form}: {error}") from None
    values = np.array(numbers).reshape(-1, 11)
    landmarks, scores = values[:, :10].astype(np.float32).reshape(-1, 5, 2), values[:, 10].copy()
    for fine, what, expected in (
        (np.isfinite(scores) & (scores >= 0), scores, "a finite score of the detector, 0 or more"),
        (aligns(landmarks), landmarks, "five finite landmarks that place a face"),
    ):
        if not fine.all():
            worst = int(np.argmin(fine))
            raise EvalError(f"{path}, line {worst + 1}: expected {expected}, found {what[worst].tolist()}")
    return places, landmarks, scores


def _read_subjects(path: Path, name: str, templates: IjbTemplates) -> Subjects:
    first_lines: dict[int, tuple[int, int]] = {}  # template -> its subject, and the line that says so
    columns = 0  # of the first line below the header
    for line, text in _text_lines(path):
        fields = [field.strip() for field in text.split(",", 2)]
        if len(fields) < 2:
            raise EvalError(f"{path}, line {line}: expected template,subject,..., found {text.strip()[:80]!r}")
        if line == 1:
            if fields[0].isdigit():
                raise EvalError(f"{path}, line 1: expected a header such as TEMPLATE_ID,SUBJECT_ID,..., found {text.strip()[:80]!r}")
            continue
        found_columns = len(next(csv.reader([text])))  # a name may hold a comma
        columns = columns or found_columns
        if found_columns != columns:  # of a file that was cut short
            raise EvalError(f"{path}, line {line}: expected {columns} fields, as in line 2, found {found_columns}: {text.strip()[:80]!r}")
        template, subject = number(path, line, fields[0], "a template"), number(path, line, fields[1], "a subject")
        known, before = first_lines.setdefault(template, (subject, line))
        if known != subject:
            raise EvalError(f"{path}, line {line}: template {template} is of subject {subject} here, and of {known} in line {before}")
    if not first_lines:
        raise EvalError(f"{path}: no template below the header")
    ids = np.array(sorted(first_lines))
    found = templates.find(ids)
    if found.min() < 0:
        lost = int(ids[np.argmin(found)])
        raise EvalError(f"{path}, line {first_lines[lost][1]}: template {lost} has no images in the file face_tid_mid.txt")
    return Subjects(name, found, np.array([first_lines[template][0] for template in ids.tolist()]))


def _refuse_repeated(path: Path, image: np.ndarray, template: np.ndarray, names: list[str]) -> None:
    order = np.lexsort((template, image))  # stable: of equal lines the first comes first
    again = (np.diff(image[order]) == 0) & (np.diff(template[order]) == 0)
    if again.any():
        at = int(np.argmax(again))
        first, second = order[at] + 1, order[at + 1] + 1
        raise EvalError(
            f"{path}, line {second}: image {names[image[second - 1]]!r} in template {template[second - 1]} again, as in line {first}"
        )


def _lines(path: Path, count: int, form: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers, from 1, and the fields of each line. Raises: EvalError for another count of fields."""
    line = 0
    for line, text in _text_lines(path):
        fields = text.split()
        if len(fields) != count:
            raise EvalError(f"{path}, line {line}: expected {form} ({count} fields), found {len(fields)}: {text.strip()[:80]!r}")
        yield line, fields
    if not line:
        raise EvalError(f"{path}: the file is empty; expected lines {form}")


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and lines, but for empty ones at the end."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            empty = 0
            for line, text in enumerate(file, start=1):
                if not text.strip():
                    empty = empty or line
                    continue
                if empty:
                    raise EvalError(f"{path}, line {empty}: an empty line, with others after it")
                yield line, text
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: not a text file in UTF-8: {error}") from error
