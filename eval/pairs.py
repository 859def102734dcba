"""Face verification on a list of pairs (LFW, and CFP or AgeDB in its format): which pairs show one person?

The embedding of an image and that of its mirror are summed and L2-normalised; a pair's score is the cosine of its two.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from eval.embedder import Embedder
from eval.errors import EvalError
from eval.verification import FIELD_GRID, PairAccuracy, TarAtFar, can_resolve, kfold_accuracy, tar_at_far
from model.vit import IMAGE_SIZE

FAR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4)
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


@dataclass(frozen=True)
class PairReport:
    """What ``evaluate_pairs`` found."""

    num_pairs: int
    num_images: int  # distinct, each embedded twice (itself and its mirror)
    embedding_size: int
    accuracy: PairAccuracy  # thresholds in steps of 0.01 squared distance, as published accuracies were read
    accuracy_exact: PairAccuracy  # thresholds searched exactly
    tar_at_far: tuple[TarAtFar, ...]  # over all pairs, at those of FAR_TARGETS that the impostor pairs resolve
    unresolved_far: tuple[float, ...]  # the others
    seconds: float  # reading and embedding

    @property
    def images_per_second(self) -> float:
        return self.num_images / self.seconds


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


def find_pairs(images_dir: str | Path, pairs_file: str | Path) -> tuple[PairList, dict[tuple[str, int], Path]]:
    """The pairs and the file of every image in them, all found before anything is embedded: a missing one must not cost an hour.

    Arguments and errors as in ``evaluate_pairs``.
    """
    images_dir = Path(images_dir)
    if not images_dir.is_dir():
        raise EvalError(f"{images_dir}: no such folder of images")
    pair_list = read_pairs(pairs_file)
    if pair_list.num_folds < 2:
        raise EvalError(f"{pairs_file}: one fold; accuracy needs two or more, to choose each one's threshold on the others")
    paths: dict[tuple[str, int], Path] = {}
    for pair in pair_list.pairs:
        for image in (pair.first, pair.second):
            if image not in paths:
                paths[image] = _find_image(images_dir, image, f"{pairs_file}, line {pair.line}")
    return pair_list, paths


def evaluate_pairs(
    embedder: Embedder, images_dir: str | Path, pairs_file: str | Path, progress: Callable[[int, int], None] | None = None
) -> PairReport:
    """Embed every image of the pairs once and score them.

    Args:
        embedder: any model, see ``eval.embedder``.
        images_dir: holds ``<Name>/<Name>_<number, 4 digits>`` with suffix .jpg, .png or .jpeg, aligned, 112 x 112.
        pairs_file: see ``read_pairs``.
        progress: called as (images done, images in all) after each batch.
    Raises: EvalError that names the image and the pairs line that asks for it, when it is missing, unreadable, of another size, or its
        embedding is not finite.
    """
    pair_list, paths = find_pairs(images_dir, pairs_file)
    start = time.perf_counter()
    embeddings = _embed_images(embedder, list(paths.values()), progress)
    seconds = time.perf_counter() - start
    row = {image: index for index, image in enumerate(paths)}
    first = embeddings[[row[pair.first] for pair in pair_list.pairs]]
    second = embeddings[[row[pair.second] for pair in pair_list.pairs]]
    scores = (first * second).sum(axis=1)
    same = np.array([pair.same for pair in pair_list.pairs])
    num_impostor = int(np.count_nonzero(~same))
    return PairReport(
        num_pairs=len(scores),
        num_images=len(paths),
        embedding_size=embeddings.shape[1],
        accuracy=kfold_accuracy(scores, same, pair_list.num_folds, FIELD_GRID),
        accuracy_exact=kfold_accuracy(scores, same, pair_list.num_folds),
        tar_at_far=tuple(tar_at_far(scores, same, far) for far in FAR_TARGETS if can_resolve(far, num_impostor)),
        unresolved_far=tuple(far for far in FAR_TARGETS if not can_resolve(far, num_impostor)),
        seconds=seconds,
    )


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
        if not name or Path(name).name != name:
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


def _embed_images(embedder: Embedder, paths: list[Path], progress: Callable[[int, int], None] | None) -> np.ndarray:
    """[n, D] float64 unit rows, in the order of ``paths``."""
    rows = []
    for start in range(0, len(paths), embedder.batch_size):
        batch = paths[start : start + embedder.batch_size]
        images = np.stack([_read_image(path) for path in batch])
        embeddings = embedder(images).astype(np.float64) + embedder(images[:, :, ::-1])
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        bad = ~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0))
        if bad.any():
            raise EvalError(
                f"{batch[int(np.argmax(bad))]}: its embedding is zero or not finite ({bad.sum()} of {len(batch)} in its batch); "
                f"check {embedder.source} and its input range, {embedder.input_range}"
            )
        rows.append(embeddings / norms)
        if progress:
            progress(start + len(batch), len(paths))
    return np.concatenate(rows)


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's errors on damaged files share no narrower base class
        raise EvalError(f"{path}: not a readable image: {error}") from error
    if mode[0] in "IF":  # Pillow has clipped them to white
        raise EvalError(f"{path}: more than 8 bits per pixel and channel (mode {mode}), expected 8")
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise EvalError(f"{path}: expected an aligned {IMAGE_SIZE} x {IMAGE_SIZE} face, found {pixels.shape[1]} x {pixels.shape[0]} pixels")
    return pixels
