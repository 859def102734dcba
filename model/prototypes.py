"""The expectation: one empirical prototype a class, moved by the embeddings of that class and never by a gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Expectation:
    """Unit prototypes e_j of one shard (EPL, arXiv:2405.12447; LVFace, arXiv:2501.13420), METHOD (17).

    ``e_y <- norm(a e_y + (1 - a) norm(f))`` with ``a = sigmoid(cos(e_y, f))``. The samples of a class in one step are averaged first
    (mean of their unit embeddings, normalised) and applied once; a class without an expectation takes that average as it is.
    """

    def __init__(self, num_rows: int, embedding_size: int, device: torch.device | str = "cpu") -> None:
        self.rows = torch.zeros(num_rows, embedding_size, device=device)  # [c, D] float32; unit where seen, zero elsewhere
        self.seen = torch.zeros(num_rows, dtype=torch.bool, device=device)  # [c]

    @torch.no_grad()
    def update(self, targets: Tensor, embeddings: Tensor) -> None:
        """Apply the samples of one optimizer step.

        Args:
            targets: [n] int64 local rows, duplicates allowed.
            embeddings: [n, D] float32 unit rows.
        """
        if not targets.numel():
            return
        order = targets.argsort(stable=True)
        row = targets[order]
        starts = torch.ones_like(row, dtype=torch.bool)
        starts[1:] = row[1:] != row[:-1]
        segment = starts.cumsum(0) - 1
        # [n] samples of each class, zero beyond the last: the number of classes stays on the device.
        lengths = torch.zeros_like(row).scatter_add_(0, segment, torch.ones_like(row))
        sums = torch.segment_reduce(embeddings[order], "sum", lengths=lengths, unsafe=True)  # unsafe: does not read the lengths
        mean = F.normalize(sums)[segment]  # one row a sample: samples of one class write the same new row
        old = self.rows[row]
        keep = torch.sigmoid((old * mean).sum(1, keepdim=True)) * self.seen[row].unsqueeze(1)  # a, and 0 for a class not seen yet
        self.rows[row] = F.normalize(keep * old + (1.0 - keep) * mean)
        self.seen[row] |= mean.any(1)  # samples that are zero, or cancel out, have no direction
