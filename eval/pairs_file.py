"""A folder of images and a list of pairs in the format of LFW's pairs.txt."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.names import is_plain_name
from eval.errors import EvalError
from eval.images import FaceImages
from eval.pair_set import PairSet

IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True)
class Pair:
    """Two images, each (person, number), and the line of the pairs file that names them."""

    first: tuple[str, int]
    second: tuple[str, int]
    line: int

    @property
    def same(self) -> bool:
        return self.first[0] == self.second[0]


@dataclass(frozen=True)
class PairList:
    """The pairs of a file in its order; fold after fold, and in each the genuine pairs before the impostor pairs."""

    num_folds: int
    pairs: tuple[Pair, ...]


def find_pairs(images_dir: str | Path, pairs_file: str | Path) -> PairSet:
    """The pairs of a file, with every image in them found before anything is embedded: a missing one must not cost an hour.

    Args:
        images_dir: holds ``<Name>/<Name>_<number, 4 digits>`` with suffix .jpg, .png or .jpeg, aligned, 112 x 112.
        pairs_file: see ``read_pairs``.
    Raises: EvalError that names the image and the pairs line that asks for it when one is missing; for a file with a single fold.
    """
    images_dir, pairs_file = Path(images_dir), Path(pairs_file)
    if not images_dir.is_dir():
        raise EvalError(f"{images_dir}: no such folder of images")
    pair_list = read_pairs(pairs_file)
    per_fold = len(pair_list.pairs) // pair_list.num_folds
    numbers: dict[tuple[str, int], int] = {}
    paths: list[Path] = []
    for pair in pair_list.pairs:
        for image in (pair.first, pair.second):
            if image not in numbers:
                numbers[image] = len(paths)
                paths.append(_find_image(images_dir, image, f"{pairs_file}, line {pair.line}"))
    return PairSet(
        source=pairs_file,
        origin=pairs_file.name,
        images=FaceImages([str(path) for path in paths], lambda image: _read_file(paths[image])),
        pairs=np.array([(numbers[pair.first], numbers[pair.second]) for pair in pair_list.pairs]),
        same=np.array([pair.same for pair in pair_list.pairs]),
        fold=np.arange(len(pair_list.pairs)) // per_fold,
        named_identities=np.unique([name for name, _ in numbers], return_inverse=True)[1].astype(np.int64),
    )


def read_pairs(path: str | Path) -> PairList:
    """Read a file in the format of LFW's pairs.txt.

    The first line holds the number of folds and n. Each fold follows with n lines ``name number number`` (two images of one person) and
    n lines ``name number name number`` (two persons). Fields are separated by tabs, so that names may hold spaces, or, in a line without
    a tab, by spaces. Blank lines are ignored.
    Raises: EvalError that names the file and the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise EvalError(f"{path}: no such pairs file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: not a text file in UTF-8: {error}") from error
    lines = [(number, _fields(line)) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise EvalError(f"{path}: the file is empty; expected a first line with the number of folds and of pairs per class, as in 10 300")
    number, header = lines[0]
    if len(header) != 2 or not all(re.fullmatch("[0-9]+", field) and int(field) > 0 for field in header):
        expected = "expected two positive numbers, folds and pairs per class in a fold (10 300)"
        raise EvalError(f"{path}, line {number}: {expected}, found {' '.join(header)!r}")
    num_folds, per_class = map(int, header)
    wanted = num_folds * 2 * per_class
    if len(lines) - 1 != wanted:
        raise EvalError(f"{path}, line {number}: {num_folds} folds of 2 x {per_class} pairs are {wanted} lines, found {len(lines) - 1}")
    pairs = [
        _parse_pair(path, number, fields, genuine=index % (2 * per_class) < per_class) for index, (number, fields) in enumerate(lines[1:])
    ]
    return PairList(num_folds, tuple(pairs))


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.strip().split("\t")] if "\t" in line else line.split()


def _parse_pair(path: Path, line: int, fields: list[str], *, genuine: bool) -> Pair:
    form = "name number number" if genuine else "name number name number"
    if genuine and len(fields) == 3:
        names, numbers = (fields[0], fields[0]), (fields[1], fields[2])
    elif not genuine and len(fields) == 4:
        names, numbers = (fields[0], fields[2]), (fields[1], fields[3])
    else:
        raise EvalError(f"{path}, line {line}: expected {form} here, found {len(fields)} fields: {' '.join(fields)!r}")
    for name, number in zip(names, numbers, strict=True):
        if not is_plain_name(name):
            raise EvalError(f"{path}, line {line}: {name!r} can't be the name of a folder of images")
        if not re.fullmatch("[0-9]+", number):
            hint = "names with spaces need tabs between fields"
            raise EvalError(f"{path}, line {line}: expected {form}, but {number!r} is no image number ({hint})")
    first, second = zip(names, map(int, numbers), strict=True)
    if first == second or genuine != (names[0] == names[1]):
        what = "an image paired with itself" if first == second else "a pair of two persons that names one person twice"
        raise EvalError(f"{path}, line {line}: {what}: {' '.join(fields)!r}")
    return Pair(first, second, line)


def _find_image(images_dir: Path, image: tuple[str, int], asked_by: str) -> Path:
    name, number = image
    stem = images_dir / name / f"{name}_{number:04d}"
    for suffix in IMAGE_SUFFIXES:
        path = stem.with_name(stem.name + suffix)  # not with_suffix: a name may hold a dot
        if path.is_file():
            return path
    raise EvalError(f"{stem}: no such image, with suffix {', '.join(IMAGE_SUFFIXES)} (asked for by {asked_by})")


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvalError(f"{path}: not a readable image: {error}") from error
