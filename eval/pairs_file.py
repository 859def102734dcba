"""A folder of images and a list of pairs: LFW's pairs.txt is read here, other lists by ``eval.pair_lists``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.names import is_plain_name
from eval.errors import EvalError
from eval.pair_lists import NUMBER, ListedPair, cfp_pairs, first_part, list_fields, listed_pairs, pair_set, read_lines, read_list
from eval.pair_set import PairSet


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
    """The pairs of a list, with every image in them found before anything is embedded.

    Args:
        images_dir: aligned faces of 112 x 112 pixels. For LFW's list ``<Name>/<Name>_<number, 4 digits>`` with suffix .jpg, .png or .jpeg.
        pairs_file: LFW's, see ``read_pairs``, or another's, see ``eval.pair_lists``.
    Raises: EvalError that names the image and the line that asks for it when one is missing; for a list with a single fold.
    """
    images_dir, pairs_file = Path(images_dir), Path(pairs_file)
    if not images_dir.is_dir():
        raise EvalError(f"{images_dir}: no such folder of images")
    if pairs_file.is_dir():
        return cfp_pairs(images_dir, pairs_file)
    lines = read_lines(pairs_file)
    first = list_fields(lines[0][1])
    if len(first) in (2, 3) and not _is_header(first):
        return listed_pairs(images_dir, pairs_file, read_list(pairs_file, lines))
    found = _parse(pairs_file, lines)
    pairs = [ListedPair(_path(pair.first), _path(pair.second), pair.same, f"{pairs_file}, line {pair.line}") for pair in found.pairs]
    fold = np.arange(len(pairs)) // (len(pairs) // found.num_folds)
    return pair_set(images_dir, pairs_file, pairs_file.name, pairs, fold, first_part)


def read_pairs(path: str | Path) -> PairList:
    """Read a file in the format of LFW's pairs.txt.

    The first line holds the number of folds and n. Each fold follows with n lines ``name number number`` (two images of one person) and
    n lines ``name number name number`` (two persons). Fields are separated by tabs, so that names may hold spaces, or, in a line without
    a tab, by spaces. Blank lines are ignored.
    Raises: EvalError that names the file and the line.
    """
    path = Path(path)
    return _parse(path, read_lines(path))


def _parse(path: Path, text: Sequence[tuple[int, str]]) -> PairList:
    """``text``: of ``read_lines``."""
    lines = [(number, _fields(line)) for number, line in text]
    number, header = lines[0]
    if not _is_header(header) or 0 in map(int, header):
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


def _path(image: tuple[str, int]) -> str:
    name, number = image
    return f"{name}/{name}_{number:04d}"


def _is_header(fields: list[str]) -> bool:
    return len(fields) == 2 and all(re.fullmatch(NUMBER, field) for field in fields)


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
        if not re.fullmatch("[0-9]{1,9}", number):
            hint = "names with spaces need tabs between fields"
            raise EvalError(f"{path}, line {line}: expected {form}, but {number!r} is no image number ({hint})")
    first, second = zip(names, map(int, numbers), strict=True)
    if first == second or genuine != (names[0] == names[1]):
        what = "an image paired with itself" if first == second else "a pair of two persons that names one person twice"
        raise EvalError(f"{path}, line {line}: {what}: {' '.join(fields)!r}")
    return Pair(first, second, line)
