"""The 1:N protocol of IJB: probes are searched for in a gallery.

A probe whose subject is in the gallery is mated; its mate is the gallery's template of that subject. The other probes are the impostors of
the open set. Rank-k is the share of mated probes whose mate is among the k best templates; a template that scores the same as the mate
counts as better. TPIR@FPIR is the highest share of mated probes whose mate scores best and reaches a threshold, where the share of
impostors that find any template at that threshold, the FPIR, is at most the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eval.errors import EvalError
from eval.ijb_meta import Search, Subjects
from eval.verification import can_resolve, tar_at_far_of_sorted

RANKS = (1, 5, 10)
FPIR_TARGETS = (1e-2, 1e-1)
BLOCK = 1024  # probes that are searched for at once


@dataclass(frozen=True)
class TpirPoint:
    """Probes find a template where its score is at least the threshold."""

    fpir: float  # target
    tpir: float
    threshold: float
    reached_fpir: float  # at the threshold


@dataclass(frozen=True)
class GalleryReport:
    """What probes found in one gallery."""

    gallery: str
    templates: int  # in the gallery
    mated: int  # probes
    impostors: int  # probes
    ranks: dict[int, float]  # k -> share of mated probes
    tpir: tuple[TpirPoint, ...]  # at those of FPIR_TARGETS that the impostors resolve
    unresolved_fpir: tuple[float, ...]  # the others


@dataclass(frozen=True)
class SearchReport:
    """Both galleries, and the means that are published."""

    galleries: tuple[GalleryReport, ...]
    mean_ranks: dict[int, float]
    mean_tpir: dict[float, float]  # FPIR -> TPIR, where both galleries resolve it


def search(features: np.ndarray, protocol: Search) -> SearchReport:
    """Search for the probes in both galleries, by dot product of rows of ``features`` [T, D] float32.

    Raises: EvalError for a gallery that holds no probe's subject.
    """
    reports = tuple(search_gallery(features, gallery, protocol.probes) for gallery in protocol.galleries)
    tpir = [{point.fpir: point.tpir for point in report.tpir} for report in reports]
    return SearchReport(
        galleries=reports,
        mean_ranks={k: float(np.mean([report.ranks[k] for report in reports])) for k in RANKS},
        mean_tpir={fpir: float(np.mean([each[fpir] for each in tpir])) for fpir in FPIR_TARGETS if all(fpir in each for each in tpir)},
    )


def search_gallery(features: np.ndarray, gallery: Subjects, probes: Subjects) -> GalleryReport:
    """Search for the probes in one gallery, see ``search``."""
    order = np.argsort(gallery.subjects)
    place = np.minimum(np.searchsorted(gallery.subjects, probes.subjects, sorter=order), len(order) - 1)
    mate = order[place]
    mated = gallery.subjects[mate] == probes.subjects
    if not mated.any():
        raise EvalError(f"gallery {gallery.name}: none of the {len(probes.subjects)} probes is of a subject in it")
    enrolled = features[gallery.templates].T
    best, of_mate, rank = (np.empty(len(mated), dtype) for dtype in (np.float32, np.float32, np.int64))
    for start in range(0, len(mated), BLOCK):
        part = slice(start, start + BLOCK)
        scores = features[probes.templates[part]] @ enrolled
        best[part] = scores.max(axis=1)
        of_mate[part] = np.take_along_axis(scores, mate[part, None], axis=1)[:, 0]
        rank[part] = np.count_nonzero(scores >= of_mate[part, None], axis=1)
    rank, impostors = rank[mated], np.sort(best[~mated])
    first = np.sort(np.where(rank == 1, of_mate[mated], -np.inf))  # a mate that is not best is not found at any threshold
    resolved = [fpir for fpir in FPIR_TARGETS if can_resolve(fpir, len(impostors))]
    points = [tar_at_far_of_sorted(first, impostors, fpir) for fpir in resolved]
    return GalleryReport(
        gallery=gallery.name,
        templates=len(order),
        mated=len(rank),
        impostors=len(impostors),
        ranks={k: float(np.mean(rank <= k)) for k in RANKS},
        tpir=tuple(TpirPoint(point.far_target, point.tar, point.threshold, point.far) for point in points),
        unresolved_fpir=tuple(fpir for fpir in FPIR_TARGETS if fpir not in resolved),
    )
