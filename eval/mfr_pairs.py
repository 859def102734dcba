"""TAR at a FAR among all pairs of a large set, exactly, without storing their scores.

The score of a pair is the float32 product of its two embeddings. Products are made tile by tile, each unordered pair once and no image
with itself. Of the impostors only the highest are kept, k + 1 of them when k may be accepted: the lowest of those is the highest impostor
that may not be, and by it alone the genuine pairs are judged. A score that is not above the lowest of k + 1 kept ones can't be among them,
so one pass is enough, which makes every product once: nothing rests on a second product being equal to the first.

Memory: the embeddings, one tile, 4 bytes for every genuine pair, and 8 to 12 for every impostor that may be accepted (1.3 million of the
1.3e12 pairs of 1.6 million images at a FAR of 1e-6). Time is that of the products; on a GPU this has not been run yet.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from eval.errors import EvalError
from eval.mfr_state import ScoringState
from eval.verification import TarAtFar, can_resolve, most_false_accepts

TILE_SIZES = {"cpu": 2048, "cuda": 8192}  # rows and columns: large enough for full speed, 16 MiB and 256 MiB of scores
_PRUNE_SLACK = 1 << 20  # scores beyond twice those to keep
_TIMED_TILES = 16  # columns that an estimate goes through in turn: of 512 numbers an image, 64 MiB on a CPU, which no cache holds


@dataclass(frozen=True)
class Comparison:
    """What is measured: which images are compared with which, and at what FAR."""

    name: str
    section_pairs: tuple[tuple[int, int], ...]  # (a, b): all of section a with all of b; (a, a): every unordered pair in a
    far: float


@dataclass(frozen=True)
class Images:
    """n embedded images in sections that lie one after the other.

    Raises: EvalError for parts that contradict each other.
    """

    labels: np.ndarray  # [n] int64, the person; equal labels are one person, across sections too
    sections: tuple[int, ...]  # number of images of each

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or sum(self.sections) != len(self.labels) or min(self.sections, default=0) < 1:
            raise EvalError(f"{len(self.labels)} labels for sections of {self.sections} images: expected one for each, no section empty")

    def bounds(self, section: int) -> tuple[int, int]:
        """(first image, one past the last)."""
        ends = list(itertools.accumulate(self.sections, initial=0))
        return ends[section], ends[section + 1]

    def sorted_by_person(self) -> np.ndarray:
        """[n] int64, the images in the order of their labels within each section."""
        bounds = [self.bounds(section) for section in range(len(self.sections))]
        return np.concatenate([start + np.argsort(self.labels[start:stop], kind="stable") for start, stop in bounds])

    def num_pairs(self, a: int, b: int) -> int:
        """Of section a with section b; of one with itself, each unordered pair once."""
        return self.sections[a] * (self.sections[a] - 1) // 2 if a == b else self.sections[a] * self.sections[b]

    def count_pairs(self, comparison: Comparison) -> tuple[int, int]:
        """(genuine, impostor) pairs. Raises: EvalError when there are too few to measure TAR at the FAR."""
        total = genuine = 0
        for a, b in comparison.section_pairs:
            first, second = (np.unique(self.labels[slice(*self.bounds(section))], return_counts=True) for section in (a, b))
            total += self.num_pairs(a, b)
            if a == b:
                genuine += int((first[1] * (first[1] - 1) // 2).sum())
            else:
                _, in_first, in_second = np.intersect1d(first[0], second[0], assume_unique=True, return_indices=True)
                genuine += int((first[1][in_first] * second[1][in_second]).sum())
        impostor = total - genuine
        if not genuine or not can_resolve(comparison.far, impostor):
            needed = f"at least 1 genuine and {1 / comparison.far:.0f} impostor pairs"
            raise EvalError(f"{comparison.name}: TAR@FAR={comparison.far:g} needs {needed}, found {genuine} and {impostor}; add images")
        return genuine, impostor


class Tail:
    """The ``keep`` highest of all scores that were added, exactly, in memory for some more than twice as many.

    Args:
        held: [m] float32, what ``values`` of an earlier one gave, to go on from.
    """

    def __init__(self, keep: int, held: Tensor | None = None) -> None:
        self._keep, self._chunks = keep, [] if held is None else [held]
        self._held = sum(map(len, self._chunks))
        self.cutoff = float("-inf")  # ``keep`` scores at least this high are held
        self._prune()

    def add(self, scores: Tensor, row_max: Tensor) -> None:
        """Add the scores above -inf of a matrix [r, c] float32 whose rows have the maxima [r]."""
        rows = scores[row_max > self.cutoff]  # few, once the cut-off has risen
        found = rows[rows > self.cutoff]
        if len(found):
            self._chunks.append(found)
            self._held += len(found)
            if self._held > 2 * self._keep + _PRUNE_SLACK:
                self._prune()

    def values(self) -> np.ndarray:
        """The highest, [at most ``keep``] float32, in any order."""
        self._prune()
        return self._chunks[0].cpu().numpy() if self._chunks else np.zeros(0, np.float32)

    def _prune(self) -> None:
        if self._held >= self._keep:
            kept = torch.topk(torch.cat(self._chunks), self._keep, sorted=False).values
            self._chunks, self._held, self.cutoff = [kept], self._keep, float(kept.min())
        elif len(self._chunks) > 1:
            self._chunks = [torch.cat(self._chunks)]


class _Tally:
    """What has been seen of one comparison. ``seen``: the scores of an earlier one, (genuine, impostor), to go on from."""

    def __init__(self, images: Images, comparison: Comparison, seen: tuple[np.ndarray, np.ndarray] | None, device: torch.device) -> None:
        self.comparison = comparison
        self._num_genuine, self._num_impostor = images.count_pairs(comparison)
        self._allowed = most_false_accepts(comparison.far, self._num_impostor)
        self._genuine = [seen[0]] if seen else []
        held = torch.as_tensor(seen[1], device=device) if seen else None
        self._impostor = Tail(min(self._allowed + 1, self._num_impostor), held)

    def add_genuine(self, scores: np.ndarray) -> None:
        self._genuine.append(scores)

    def add_impostor(self, scores: Tensor, row_max: Tensor) -> None:
        self._impostor.add(scores, row_max)

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores of (all genuine, the highest impostor) pairs so far, float32."""
        self._genuine = [np.concatenate([np.zeros(0, np.float32), *self._genuine])]
        return self._genuine[0], self._impostor.values()

    def result(self) -> TarAtFar:
        genuine, impostor = self.seen()
        if len(genuine) != self._num_genuine:
            raise RuntimeError(f"{self.comparison.name}: {len(genuine)} genuine pairs seen, expected {self._num_genuine}")
        impostor = np.sort(impostor)[::-1]
        refused = impostor[self._allowed] if self._allowed < self._num_impostor else np.float32(-np.inf)  # the highest that must be
        accepted_genuine, accepted_impostor = genuine[genuine > refused], impostor[impostor > refused]
        accepted = np.concatenate([accepted_genuine, accepted_impostor])
        return TarAtFar(
            far_target=self.comparison.far,
            tar=len(accepted_genuine) / self._num_genuine,
            far=len(accepted_impostor) / self._num_impostor,
            threshold=float(accepted.min()) if len(accepted) else float(np.nextafter(np.float64(refused), np.inf)),
            genuine=self._num_genuine,
            impostor=self._num_impostor,
        )


@dataclass(frozen=True)
class _Strip:
    """Tiles side by side: some images of one section against those of another, or against those after them in the same."""

    section_pair: tuple[int, int]
    rows: tuple[int, int]  # of all images: first, one past the last
    columns: tuple[int, int]  # the same; in one section they begin where the rows do

    def tiles(self, tile_size: int) -> Iterator[tuple[slice, slice]]:
        for start in range(*self.columns, tile_size):
            yield slice(*self.rows), slice(start, min(start + tile_size, self.columns[1]))

    @property
    def num_pairs(self) -> int:
        height = self.rows[1] - self.rows[0]
        return _num_pairs(height, self.columns[1] - self.columns[0], self.rows[0] == self.columns[0])


class _Products:
    """Makes the tiles, into one buffer, and shares out their scores. ``labels`` ascend along the rows and along the columns of any tile."""

    def __init__(self, embeddings: np.ndarray, labels: np.ndarray, tile_size: int, device: torch.device) -> None:
        self._embeddings, self._device_labels = torch.as_tensor(embeddings, device=device), torch.as_tensor(labels, device=device)
        self._labels = labels
        self._buffer = torch.empty(tile_size * tile_size, device=device)

    def share_out(self, rows: slice, columns: slice, tallies: Sequence[_Tally]) -> int:
        """Score every row with every column, or, of equal ones, with the columns after it. Returns the number of pairs."""
        first, second = self._embeddings[rows], self._embeddings[columns]
        scores = self._buffer[: len(first) * len(second)].view(len(first), len(second))
        torch.mm(first, second.T, out=scores)
        diagonal = rows.start == columns.start
        row_labels, column_labels = self._labels[rows], self._labels[columns]
        if _may_be_genuine(row_labels, column_labels):
            genuine = self._device_labels[rows][:, None] == self._device_labels[columns]
            no_impostor = genuine
            if diagonal:
                above = torch.ones_like(genuine).triu_(1)
                no_impostor, genuine = genuine | ~above, genuine & above
            found = scores[genuine].cpu().numpy()
            scores.masked_fill_(no_impostor, float("-inf"))
            for tally in tallies:
                tally.add_genuine(found)
        row_max = scores.amax(dim=1)
        for tally in tallies:
            tally.add_impostor(scores, row_max)
        return _num_pairs(len(first), len(second), diagonal)


def score_pairs(
    embeddings: np.ndarray,
    images: Images,
    comparisons: Sequence[Comparison],
    *,
    device: torch.device | str = "cpu",
    tile_size: int | None = None,
    state: ScoringState | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TarAtFar]:
    """TAR at the lowest threshold whose FAR is at most the target, as ``eval.verification.tar_at_far`` defines it, by comparison.

    A tile that several comparisons ask for is made once.

    Args:
        embeddings: [n, D] float32, finite; of unit length where the scores are to be cosines. Not modified.
        tile_size: rows and columns of a tile; by default what suits the device.
        state: where to keep progress. A run that was stopped goes on from it: every pair is scored by the same product, so the result is
            that of a run that never stopped.
        progress: called as (pairs compared, pairs to compare) after each tile; a run that goes on counts what was left to it.
    Raises: EvalError for pairs that can't resolve a FAR, embeddings that are not finite, a state of other data, or a device whose float32
        products are not of float32 precision.
    """
    device = torch.device(device)
    tile_size = tile_size or TILE_SIZES[device.type]
    for comparison in comparisons:
        images.count_pairs(comparison)
    if embeddings.dtype != np.float32 or embeddings.ndim != 2 or len(embeddings) != len(images.labels):
        raise EvalError(f"expected embeddings [{len(images.labels)}, D] float32, got {embeddings.dtype} {list(embeddings.shape)}")
    if not np.isfinite(embeddings).all():
        raise EvalError(f"{np.count_nonzero(~np.isfinite(embeddings).all(axis=1))} of {len(embeddings)} embeddings are not finite")
    order = images.sorted_by_person()  # then nearly every tile holds impostors alone
    labels = images.labels[order]
    if (order != np.arange(len(order))).any():
        embeddings = embeddings[order]

    strips = [strip for pair in section_pairs(comparisons) for strip in _strips(pair, images, tile_size)]
    done, seen = 0, {}
    if state:
        done, seen = state.open(_described(embeddings, labels, images, comparisons, device, tile_size), len(strips))
    tallies = [_Tally(images, each, seen.get(each.name), device) for each in comparisons]
    products = _Products(embeddings, labels, tile_size, device)
    compared, total = 0, sum(strip.num_pairs for strip in strips[done:])
    with full_float32(device):
        for number, strip in enumerate(strips[done:], start=done + 1):
            wanted = [tally for tally in tallies if strip.section_pair in tally.comparison.section_pairs]
            for rows, columns in strip.tiles(tile_size):
                compared += products.share_out(rows, columns, wanted)
                if progress:
                    progress(compared, total)
            if state and (number == len(strips) or state.is_due()):
                state.save(number, {tally.comparison.name: tally.seen() for tally in tallies})
    return {tally.comparison.name: tally.result() for tally in tallies}


@dataclass(frozen=True)
class TileSpeed:
    """Products a second that ``score_pairs`` makes and looks at."""

    tile_size: int
    impostors: float  # in tiles that hold no genuine pair
    mixed: float  # in the others, most of which lie on the diagonal, where half of the products is no pair

    @classmethod
    def measure(cls, embedding_size: int, device: torch.device | str = "cpu", seconds: float = 2.0) -> "TileSpeed":
        """On tiles of noise, with a FAR of 1e-6, for as many seconds a kind."""
        device = torch.device(device)
        tile_size = TILE_SIZES[device.type]
        size = (1 + _TIMED_TILES) * tile_size
        images = Images(np.arange(size) // 2, (tile_size, size - tile_size))  # persons of two: none is in both sections
        noise = np.random.default_rng(0).standard_normal((size, embedding_size), dtype=np.float32)
        tally = _Tally(images, Comparison("noise", ((0, 0), (0, 1)), 1e-6), None, device)
        products = _Products(noise, images.labels, tile_size, device)
        first, *others = (slice(start, start + tile_size) for start in range(0, size, tile_size))

        def rate(tiles: Sequence[tuple[slice, slice]], seconds: float) -> float:
            start, made = time.perf_counter(), 0
            for rows, columns in itertools.cycle(tiles):
                products.share_out(rows, columns, [tally])
                made += tile_size * tile_size
                taken = time.perf_counter() - start
                if taken >= seconds:
                    return made / taken

        with full_float32(device):
            beside = [(first, tile) for tile in others]
            rate(beside, seconds / 4)  # raises the cut-off to where it stays
            return cls(tile_size, rate(beside, seconds), rate([(tile, tile) for tile in others], seconds))

    def seconds(self, images: Images, comparisons: Sequence[Comparison]) -> float:
        """That ``score_pairs`` would take."""
        labels = images.labels[images.sorted_by_person()]
        total = 0.0
        for pair in section_pairs(comparisons):
            for strip in _strips(pair, images, self.tile_size):
                for rows, columns in strip.tiles(self.tile_size):
                    speed = self.mixed if _may_be_genuine(labels[rows], labels[columns]) else self.impostors
                    total += (rows.stop - rows.start) * (columns.stop - columns.start) / speed
        return total


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32: no TF32 on a GPU and no bfloat16 on a CPU, whatever was allowed outside.

    Raises: EvalError when they still are not, as an environment variable of a library may have it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        # What 24 bits of mantissa hold and 11 or 8 do not.
        value = torch.full((256, 256), 1 + 2.0**-20, device=device)
        if not torch.equal(torch.mm(value, torch.eye(256, device=device)), value):
            raise EvalError(
                f"float32 products on {device} are made of fewer bits (TF32, bfloat16); unset what allows it, as NVIDIA_TF32_OVERRIDE"
            )
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def section_pairs(comparisons: Sequence[Comparison]) -> list[tuple[int, int]]:
    """What is to be compared, each once, in the order in which it is first asked for."""
    return list(dict.fromkeys(pair for comparison in comparisons for pair in comparison.section_pairs))


def _strips(section_pair: tuple[int, int], images: Images, tile_size: int) -> Iterator[_Strip]:
    (start, stop), columns = (images.bounds(section) for section in section_pair)
    for first in range(start, stop, tile_size):
        rows = (first, min(first + tile_size, stop))
        yield _Strip(section_pair, rows, (first, stop) if section_pair[0] == section_pair[1] else columns)


def _may_be_genuine(row_labels: np.ndarray, column_labels: np.ndarray) -> bool:
    """Whether any pair of a tile may be: both ascend."""
    return bool(row_labels[0] <= column_labels[-1] and column_labels[0] <= row_labels[-1])


def _num_pairs(height: int, width: int, diagonal: bool) -> int:
    """Of a tile, or of several side by side. Where it begins on the diagonal, half of a square of it counts."""
    return height * width - height * (height + 1) // 2 if diagonal else height * width


def _described(
    embeddings: np.ndarray, labels: np.ndarray, images: Images, comparisons: Sequence[Comparison], device: torch.device, tile_size: int
) -> dict[str, object]:
    """All that the scores depend on, for a state: the data, the question, and what makes the products."""
    return {
        "embeddings": hashlib.sha256(np.ascontiguousarray(embeddings)).hexdigest(),
        "labels": hashlib.sha256(np.ascontiguousarray(labels)).hexdigest(),
        "sections": list(images.sections),
        "comparisons": [asdict(each) for each in comparisons],
        "tile_size": tile_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
