"""What the head notes of its micro-batches for a log, on the device and without waiting for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COSINE_EDGES = tuple(round(-0.2 + 0.1 * i, 1) for i in range(13))  # upper edges of the histogram's buckets; one more lies above them


class Observation:
    """Filled by :class:`model.partial_fc.PartialFC`."""

    def __init__(self, device: torch.device) -> None:
        self._edges = torch.tensor(COSINE_EDGES, dtype=torch.float64, device=device)
        self._counts = torch.zeros(len(COSINE_EDGES) + 1, dtype=torch.int64, device=device)
        # Of the last micro-batch that was observed: the mean over its first chunk of samples of the highest cosine to another class.
        self.hardest_negative = torch.full((), math.nan, dtype=torch.float64, device=device)
        self.positive = torch.zeros((), dtype=torch.int64, device=device)  # of this rank's classes, those with a sample in it
        self.sampled = 0  # of this rank's classes, those that the last micro-batch scored

    def note_cosines(self, cosine: Tensor, held: Tensor) -> None:
        """``cosine`` [b] float64 of this rank's samples to their own class, where ``held`` [b] bool."""
        self._counts.index_add_(0, torch.bucketize(cosine, self._edges), held.long())

    def note_classes(self, targets: Tensor, sampled: int) -> None:
        """``targets`` [B] int64: local row of every sample's class, -1 where another rank owns it; ``sampled``: rows that are scored."""
        ordered = targets.sort().values
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        self.positive, self.sampled = (first & (ordered >= 0)).sum(), sampled

    def take_cosines(self) -> list[int]:
        """Samples by bucket (COSINE_EDGES, and above) since the last call; the host waits for the device."""
        counts = self._counts.tolist()
        self._counts.zero_()
        return counts
