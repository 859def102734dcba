"""IJB-B and IJB-C: templates of many images, compared one to one and searched for one in many."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eval.curves import ScoreCurves, score_curves
from eval.ijb_identification import SearchReport, search
from eval.ijb_meta import IjbTemplates, Search
from eval.ijb_pairs import TemplatePairs
from eval.ijb_templates import DEFAULT_MODE, MODES, pool_templates
from eval.ijb_verification import FAR_TARGETS, TarPoint, nearest_tars, score_pairs, strict_tars
from eval.verification import can_resolve

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ModeReport:
    """What one mode gives; parts of a protocol that was not asked for are empty or None."""

    strict: tuple[TarPoint, ...]  # at those of FAR_TARGETS that the impostor pairs resolve
    nearest: tuple[TarPoint, ...]  # at the same
    search: SearchReport | None


@dataclass(frozen=True)
class IjbReport:
    """What ``evaluate_templates`` found."""

    embedding_size: int
    genuine: int  # pairs of one person
    impostor: int  # pairs of two
    repeated: int  # pairs that the file lists again
    unresolved_far: tuple[float, ...]
    modes: dict[str, ModeReport]  # N1D1F1 first
    curves: ScoreCurves | None  # of N1D1F1
    seconds: float  # pooling and all modes


def evaluate_templates(
    embeddings: np.ndarray,
    templates: IjbTemplates,
    pairs: TemplatePairs | None,
    protocol: Search | None,
    progress: Callable[[str], Progress] | None = None,
) -> IjbReport:
    """Both protocols, as far as they are given, in every mode.

    Args:
        embeddings: [n, 2, D] of the images and their mirrors, see ``eval.ijb_templates.pool_templates``.
        progress: makes what is called as (done, in all), from the plural of what is counted.
    Raises: EvalError for an embedding or a template that is zero or not finite, or a gallery without mated probes.
    """
    start = time.perf_counter()
    pooled = pool_templates(embeddings, templates, progress and progress("images pooled"))
    num_impostor = int(np.count_nonzero(~pairs.same)) if pairs else 0
    resolved = [far for far in FAR_TARGETS if can_resolve(far, num_impostor)]
    modes, curves = {}, None
    for mode, features in zip(MODES, pooled, strict=True):
        strict = nearest = ()
        if pairs:
            scores = score_pairs(features, pairs, progress and progress(f"pairs scored in {mode}"))
            genuine, impostor = np.sort(scores[pairs.same]), np.sort(scores[~pairs.same])
            strict, nearest = strict_tars(genuine, impostor, resolved), nearest_tars(genuine, impostor, resolved)
            if mode == DEFAULT_MODE:
                curves = score_curves(genuine, impostor)
        modes[str(mode)] = ModeReport(strict, nearest, search(features, protocol) if protocol else None)
    return IjbReport(
        embedding_size=pooled.shape[2],
        genuine=len(pairs.same) - num_impostor if pairs else 0,
        impostor=num_impostor,
        repeated=pairs.repeated if pairs else 0,
        unresolved_far=tuple(far for far in FAR_TARGETS if far not in resolved) if pairs else (),
        modes=modes,
        curves=curves,
        seconds=time.perf_counter() - start,
    )
