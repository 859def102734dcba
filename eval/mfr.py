"""MFR-Ongoing on one's own sets: its server is offline and its images were never public, so here is its protocol for the images you have.

One forward of each image, no mirror; a score is the cosine of two embeddings. TAR at the lowest threshold whose FAR is at most the target:

    mask                                            each masked image against each plain one                FAR 1e-4
    children                                        all to all                                              FAR 1e-4
    african, caucasian, south_asian, east_asian     all to all                                              FAR 1e-6
    mr_all                                          all to all, the images of the four races together       FAR 1e-6

Its table is ordered by 0.25 mask + 0.75 mr_all. Source: github.com/deepinsight/insightface, challenges/mfr/README.md. Here each unordered
pair counts once; the numbers of negative pairs that are published there are n (n - 1) - positives for n images, which has each twice.

The published sets hold 20,892 images (mask), 157,280 (children) and 1,624,305 (the races). How one's own lie on the disk says
``eval.mfr_folder``; how exact thresholds come of 1.3e12 pairs says ``eval.mfr_pairs``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from eval.embed import embed
from eval.embedder import Embedder
from eval.images import FaceImages
from eval.mfr_folder import RACES, MfrFolder, Section, face_images, labelled
from eval.mfr_pairs import Comparison, Images, TileSpeed, score_pairs, section_pairs
from eval.mfr_state import ScoringState
from eval.verification import TarAtFar

FAR = {"mask": 1e-4, "children": 1e-4, **dict.fromkeys((*RACES, "mr_all"), 1e-6)}  # every set of the protocol -> its target
_BLOCK = 1 << 16  # images normalised at once


@dataclass(frozen=True)
class Part:
    """Images that are embedded together, and the sets that are measured on them."""

    name: str
    sections: tuple[Section, ...]
    images: Images
    comparisons: tuple[Comparison, ...]

    @property
    def num_pairs(self) -> int:
        """To compare, each once, whatever sets it counts for."""
        return sum(self.images.num_pairs(*pair) for pair in section_pairs(self.comparisons))


@dataclass(frozen=True)
class SetResult:
    """TAR@FAR of one set."""

    images: int
    identities: int
    tar_at_far: TarAtFar


def parts_of(folder: MfrFolder) -> list[Part]:
    """What can be measured: mask, children, and the races together, whose pairs count for their race and, of all four, for mr_all.

    Raises: EvalError for a set whose impostor pairs can't resolve its FAR, before anything is embedded.
    """
    parts = []
    if folder.mask:
        parts.append(_part("mask", folder.mask, {"mask": ((0, 1),)}))
    if folder.children:
        parts.append(_part("children", (folder.children,), {"children": ((0, 0),)}))
    if folder.races:
        pairs = {race: ((number, number),) for number, race in enumerate(folder.races)}
        if len(folder.races) == len(RACES):
            pairs["mr_all"] = tuple(itertools.combinations_with_replacement(range(len(RACES)), 2))
        parts.append(_part("races", tuple(folder.races.values()), pairs))
    return parts


def why_absent(name: str, folder: MfrFolder) -> str:
    """Of a set that is in no part."""
    if name != "mr_all":
        return f"no folder {name}"
    missing = [race for race in RACES if race not in folder.races]
    return f"needs all four races: no folder {', '.join(missing)}"


@dataclass(frozen=True)
class Estimate:
    """What an evaluation would take."""

    images: int
    pairs: int
    images_per_second: float  # measured
    scoring_seconds: float  # from tiles that were measured

    @property
    def embedding_seconds(self) -> float:
        return self.images / self.images_per_second


def estimate(embedder: Embedder, parts: Sequence[Part], *, ranks: int = 1, device: torch.device | str = "cpu", **options: Any) -> Estimate:
    """Embed a few batches and compare tiles of pairs, for some seconds. Arguments are those of ``embed_part`` and ``score_part``.

    ``ranks``: processes that will share the embedding, each of which measures for itself now. One scores.
    """
    images = face_images(parts[-1].sections)
    few = min(len(images), 4 * embedder.batch_size)
    embed(embedder, FaceImages(images.names[: embedder.batch_size], images.read), mirror=False, **options)  # starts what starts once
    begin = time.perf_counter()
    rows = embed(embedder, FaceImages(images.names[:few], images.read), mirror=False, **options)
    images_per_second = ranks * few / (time.perf_counter() - begin)
    speed = TileSpeed.measure(rows.shape[-1], device)
    return Estimate(
        images=sum(len(part.images.labels) for part in parts),
        pairs=sum(part.num_pairs for part in parts),
        images_per_second=images_per_second,
        scoring_seconds=sum(speed.seconds(part.images, part.comparisons) for part in parts),
    )


def embed_part(embedder: Embedder, part: Part, **options: Any) -> np.ndarray | None:
    """[n, D] float32 of unit length, in the order of the part's images; None on all ranks of ``options["group"]`` but the first.

    ``options``: of ``eval.embed.embed``. Collectives: its.
    """
    rows = embed(embedder, face_images(part.sections), mirror=False, **options)
    if rows is None:
        return None
    rows = rows[:, 0]
    unit = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].astype(np.float64)
        unit[start : start + _BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return unit


def score_part(
    part: Part,
    embeddings: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    state: ScoringState | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, SetResult]:
    """Every set of the part. Arguments are those of ``eval.mfr_pairs.score_pairs``."""
    found = score_pairs(embeddings, part.images, part.comparisons, device=device, state=state, progress=progress)
    results = {}
    for comparison in part.comparisons:
        sections = [part.sections[number] for number in sorted(set(itertools.chain(*comparison.section_pairs)))]
        identities = {identity for section in sections for identity in section.identities}
        results[comparison.name] = SetResult(sum(len(each.paths) for each in sections), len(identities), found[comparison.name])
    return results


def as_record(results: dict[str, SetResult]) -> dict[str, object]:
    """For JSON: ``sets``, each of the protocol with its numbers, or null where it is absent, and ``score``."""
    sets = {}
    for name in FAR:
        result = results.get(name)
        sets[name] = result and {**asdict(result.tar_at_far), "images": result.images, "identities": result.identities}
    return {"score": score(results), "sets": sets}


def score(results: dict[str, SetResult]) -> float | None:
    """What the published table is ordered by; None when a set that it needs is absent."""
    if not {"mask", "mr_all"} <= set(results):
        return None
    return 0.25 * results["mask"].tar_at_far.tar + 0.75 * results["mr_all"].tar_at_far.tar


def _part(name: str, sections: tuple[Section, ...], section_pairs: dict[str, tuple[tuple[int, int], ...]]) -> Part:
    images = labelled(sections)
    comparisons = tuple(Comparison(each, pairs, FAR[each]) for each, pairs in section_pairs.items())
    for comparison in comparisons:
        images.count_pairs(comparison)
    return Part(name, sections, images, comparisons)
