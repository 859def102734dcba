"""Pairs as CALFW, CPLFW, AgeDB and CFP list them: by file names. LFW's own list is ``eval.pairs_file``'s.

- A text file with two lines for each pair, ``image flag`` and ``image flag``: CALFW's and CPLFW's. The flag is 0 for two persons, and any
  other number, the same in both lines, for one.
- A text file with one line for each pair, ``image image flag``, parted by commas, tabs or spaces; the flag is 1 or 0.
- CFP's folder ``Protocol/Split/FP`` or ``FF``: a folder for each fold, with ``same.txt`` and ``diff.txt``, whose lines ``i,j`` are
  numbers in ``Protocol/Pair_list_F.txt`` and, under FP the second one, ``Pair_list_P.txt``: ``number path``. Of a path the last three parts
  count, ``001/frontal/01.jpg``; the first of them is the person.

Text files have no folds: ten contiguous ones are cut, as the field's packs of these sets are evaluated.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from eval.bin_pack import NUM_FOLDS
from eval.errors import EvalError
from eval.images import IMAGE_SUFFIXES, FaceImages, read_image
from eval.pair_set import PairSet
from eval.verification import contiguous_folds

NUMBER = "[0-9]{1,18}"  # what a number in a list may be: it fits into int64
_CFP_LISTS = {"F": "Pair_list_F.txt", "P": "Pair_list_P.txt"}  # frontal and profile


@dataclass(frozen=True)
class ListedPair:
    """Two images by their paths below the folder of images."""

    first: str
    second: str
    same: bool
    where: str  # the file and line that says so, for messages


def read_list(path: Path, lines: Sequence[tuple[int, str]]) -> list[ListedPair]:
    """The pairs of a text file, see above. ``lines``: (number, text) of those that are not blank. Raises: EvalError that names the line."""
    fields = [(number, list_fields(text)) for number, text in lines]
    width = len(fields[0][1])  # 2 or 3
    for number, words in fields:
        if len(words) != width:
            raise EvalError(f"{path}, line {number}: expected {width} fields, as in line {fields[0][0]}, found {len(words)}")
        if not re.fullmatch(NUMBER, words[-1]) or (width == 3 and words[-1] not in ("0", "1")):
            expected = "1 for one person or 0 for two" if width == 3 else "0 for two persons, or another number for one"
            raise EvalError(f"{path}, line {number}: expected {expected} at its end, found {words[-1]!r:.40}")
    if width == 3:
        return [ListedPair(words[0], words[1], words[2] == "1", f"{path}, line {number}") for number, words in fields]
    if len(fields) % 2:
        raise EvalError(f"{path}: two lines make a pair, found {len(fields)}; the last line, {fields[-1][0]}, has no partner")
    pairs = []
    for (number, (first, flag)), (other, (second, other_flag)) in zip(fields[::2], fields[1::2], strict=True):
        if flag != other_flag:
            raise EvalError(f"{path}, lines {number} and {other}: a pair's flags must be equal, found {flag} and {other_flag}")
        pairs.append(ListedPair(first, second, int(flag) != 0, f"{path}, line {number}"))
    return pairs


def list_fields(line: str) -> list[str]:
    """Of a line of a text file: what commas, tabs or spaces part."""
    return line.replace(",", " ").split()


def listed_pairs(images_dir: Path, source: Path, pairs: Sequence[ListedPair]) -> PairSet:
    """The pairs of a text file, every image found. Nobody is named in it: identities are inferred. Raises: EvalError."""
    try:
        fold = contiguous_folds(len(pairs), NUM_FOLDS)
    except EvalError as error:
        raise EvalError(f"{source}: {error}") from error
    return pair_set(images_dir, source, source.name, pairs, fold, None)


def cfp_pairs(images_dir: Path, split: Path) -> PairSet:
    """The pairs of CFP's folder ``Protocol/Split/FP`` or ``FF``, every image found. Raises: EvalError that names file and line."""
    if split.name not in ("FP", "FF"):
        raise EvalError(f"{split}: a folder: expected a list of pairs, or CFP's folder Protocol/Split/FP or Protocol/Split/FF")
    first, second = (_cfp_paths(split.parent.parent / _CFP_LISTS[kind]) for kind in split.name)
    folds = sorted(path for path in split.iterdir() if path.is_dir())
    if len(folds) < 2:
        raise EvalError(f"{split}: expected a folder for each fold, two at least, found {len(folds)}")
    pairs: list[ListedPair] = []
    fold: list[int] = []
    for number, folder in enumerate(folds):
        for name, same in (("same.txt", True), ("diff.txt", False)):
            found = list(_cfp_fold(folder / name, first, second, same))
            pairs += found
            fold += [number] * len(found)
    return pair_set(images_dir, split, f"cfp_{split.name.lower()}", pairs, np.array(fold, np.int64), first_part)


def _cfp_paths(path: Path) -> dict[int, str]:
    """Number -> the last three parts of its path."""
    paths: dict[int, str] = {}
    lines: dict[int, int] = {}  # number -> where it stands
    for line, text in read_lines(path):
        words = text.split()
        if len(words) != 2 or not re.fullmatch(NUMBER, words[0]) or len(PurePosixPath(words[1]).parts) < 3:
            raise EvalError(
                f"{path}, line {line}: expected a number and a path such as ../Data/Images/001/frontal/01.jpg, found {text!r:.80}"
            )
        number = int(words[0])
        if lines.setdefault(number, line) != line:
            raise EvalError(f"{path}, line {line}: number {number} again, first in line {lines[number]}; expected each once")
        paths[number] = "/".join(PurePosixPath(words[1]).parts[-3:])
    return paths


def _cfp_fold(path: Path, first: dict[int, str], second: dict[int, str], same: bool) -> Iterator[ListedPair]:
    for line, text in read_lines(path):
        match = re.fullmatch(rf"\s*({NUMBER})\s*,\s*({NUMBER})\s*", text)
        if not match:
            raise EvalError(f"{path}, line {line}: expected two numbers i,j, found {text.strip()!r:.80}")
        numbers = [int(number) for number in match.groups()]
        for number, known in zip(numbers, (first, second), strict=True):
            if number not in known:
                raise EvalError(f"{path}, line {line}: image {number} is in no list; those have the numbers {min(known)} to {max(known)}")
        pair = ListedPair(first[numbers[0]], second[numbers[1]], same, f"{path}, line {line}")
        if (first_part(pair.first) == first_part(pair.second)) != same:
            raise EvalError(f"{pair.where}: a pair of {'one person' if same else 'two persons'}, but it is {pair.first} and {pair.second}")
        yield pair


def first_part(image: str) -> str:
    """The folder that an image's path begins with."""
    return image.split("/")[0]


def pair_set(
    images_dir: Path,
    source: Path,
    origin: str,
    pairs: Sequence[ListedPair],
    fold: np.ndarray,
    person: Callable[[str], str] | None,
) -> PairSet:
    """A list of pairs as a PairSet, every image found: a missing one must not cost an hour.

    Args:
        images_dir: holds the images, aligned, 112 x 112; one is also found if its suffix is another of IMAGE_SUFFIXES than is listed.
        person: who is on an image, by its path; None: the list does not say.
    Raises: EvalError that names the image and the line that asks for it.
    """
    numbers: dict[str, int] = {}  # of the image that is listed so
    places: dict[Path, int] = {}  # the same by file: a/b.jpg, ./a/b.jpg and a/b.png may be one
    first_listed: list[str] = []  # each image, as it is listed first
    known: dict[frozenset[int], ListedPair] = {}
    for pair in pairs:
        for image in (pair.first, pair.second):
            if image not in numbers:
                numbers[image] = places.setdefault(_find(images_dir, image, pair.where), len(places))
                if numbers[image] == len(first_listed):
                    first_listed.append(image)
        if numbers[pair.first] == numbers[pair.second]:
            raise EvalError(f"{pair.where}: an image paired with itself: {' and '.join(dict.fromkeys((pair.first, pair.second)))}")
        before = known.setdefault(frozenset((numbers[pair.first], numbers[pair.second])), pair)
        if before.same != pair.same:
            kind = "of one person" if pair.same else "of two persons"
            raise EvalError(f"{pair.where}: a pair {kind}, but {before.where} says otherwise of {pair.first} and {pair.second}")
    paths = list(places)
    identities = np.unique([person(image) for image in first_listed], return_inverse=True)[1].astype(np.int64) if person else None
    return PairSet(
        source=source,
        origin=origin,
        images=FaceImages([str(path) for path in paths], lambda image: read_image(paths[image])),
        pairs=np.array([(numbers[pair.first], numbers[pair.second]) for pair in pairs]),
        same=np.array([pair.same for pair in pairs]),
        fold=fold,
        named_identities=identities,
    )


def _find(images_dir: Path, image: str, where: str) -> Path:
    relative = PurePosixPath(image)
    if relative.is_absolute() or ".." in relative.parts or "\0" in image:
        raise EvalError(f"{where}: {image!r:.80} leads out of the folder of images; expected a path below it")
    path = images_dir / relative
    stem = path.with_name(path.name.removesuffix(path.suffix)) if path.suffix.lower() in IMAGE_SUFFIXES else path
    for candidate in (path, *(stem.with_name(stem.name + suffix) for suffix in IMAGE_SUFFIXES)):
        if candidate.is_file():
            return candidate
    raise EvalError(f"{path}: no such image, with suffix {', '.join(IMAGE_SUFFIXES)} (asked for by {where})")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines of a text file that are not blank, one at least. Raises: EvalError that names the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a mark of its encoding
    except FileNotFoundError as error:
        raise EvalError(f"{path}: no such pairs file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: not a text file in UTF-8: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise EvalError(f"{path}: the file is empty; expected pairs")
    return lines
