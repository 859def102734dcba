"""What a class remembers of its samples: the expectation, an average that EPL and LVFace score against, and VPL's last embedding.

Both are moved by the embeddings of the class and never by a gradient. The samples of a class in one step are averaged first (mean of their
unit embeddings, normalised) and applied once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Expectation:
    """Unit prototypes e_j of one shard (EPL, arXiv:2405.12447; LVFace, arXiv:2501.13420).

    ``e_y <- norm(a e_y + (1 - a) norm(f))`` with ``a = sigmoid(cos(e_y, f))``; a class without an expectation takes the average of its
    samples as it is.
    """

    def __init__(self, num_rows: int, embedding_size: int, device: torch.device | str = "cpu") -> None:
        self.rows = torch.zeros(num_rows, embedding_size, device=device)  # [c, D] float32; unit where seen, zero elsewhere
        self.seen = torch.zeros(num_rows, dtype=torch.bool, device=device)  # [c]
        # [2] float64: sum of 1 - cos(old, new) over the classes that the last update moved, and their number; new ones do not count
        self.drift = torch.zeros(2, dtype=torch.float64, device=device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)  # classes that updates gave a new value, since the start

    @torch.no_grad()
    def update(self, targets: Tensor, embeddings: Tensor) -> None:
        """Apply the samples of one optimizer step.

        Args:
            targets: [n] int64 local rows, duplicates allowed.
            embeddings: [n, D] float32 unit rows.
        """
        self.drift.zero_()
        if not targets.numel():
            return
        row, mean, first = class_means(targets, embeddings)
        old, seen = self.rows[row], self.seen[row]
        keep = torch.sigmoid((old * mean).sum(1, keepdim=True)) * seen.unsqueeze(1)  # a, and 0 for a class not seen yet
        new = F.normalize(keep * old + (1.0 - keep) * mean)
        self.rows[row] = new  # one row a sample: samples of one class write the same
        self.seen[row] |= mean.any(1)  # samples that are zero, or cancel out, have no direction
        moved = first & seen
        self.updates += first.sum()
        self.drift[0] = ((1.0 - (old.double() * new.double()).sum(1)) * moved).sum()
        self.drift[1] = moved.sum()


class LastEmbeddings:
    """M_j, the last embedding of each class of one shard, while it is fresh (VPL, CVPR 2021).

    The published run lets its memory fill for 8,000 steps before it is used, and keeps one sample a class; here it fills from the first
    step of the stage on, and a class not met yet is scored by its center alone.
    """

    FRESH_STEPS = 200
    SHARE = 0.15  # lambda: how far M_j draws its class center

    def __init__(self, num_rows: int, embedding_size: int, device: torch.device | str = "cpu") -> None:
        self.rows = torch.zeros(num_rows, embedding_size, device=device)  # [c, D] float32 unit rows, zero before the first
        self.written = torch.full((num_rows,), -self.FRESH_STEPS - 1, device=device)  # [c] int64: steps taken before the one that wrote it

    @torch.no_grad()
    def update(self, targets: Tensor, embeddings: Tensor, step: int) -> None:
        """Remember the samples of optimizer step ``step`` (from 0); arguments as of :meth:`Expectation.update`."""
        if targets.numel():
            row, mean, _ = class_means(targets, embeddings)
            self.rows[row] = mean
            # samples that are zero, or cancel out, have no direction: such a class has nothing to remember
            self.written[row] = torch.where(mean.any(1), step, -self.FRESH_STEPS - 1)

    def shares(self, step: int) -> Tensor:
        """[c] float32: lambda where M_j is at most 200 steps old at optimizer step ``step``, else 0."""
        return ((step - self.written) <= self.FRESH_STEPS) * self.SHARE


def class_means(targets: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row [n] int64 sorted, normalised mean of its class [n, D], whether it is the first of its class [n]) of samples grouped by class.

    One row a sample, so that the number of classes stays on the device.
    """
    order = targets.argsort(stable=True)
    row = targets[order]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    segment = first.cumsum(0) - 1
    # [n] samples of each class, zero beyond the last
    lengths = torch.zeros_like(row).scatter_add_(0, segment, torch.ones_like(row))
    sums = torch.segment_reduce(embeddings[order], "sum", lengths=lengths, unsafe=True)  # unsafe: does not read the lengths
    return row, F.normalize(sums)[segment], first
