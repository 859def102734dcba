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
        rows, inverse = targets.unique(return_inverse=True)
        sums = embeddings.new_zeros(rows.numel(), embeddings.shape[1]).index_add_(0, inverse, embeddings)
        mean = F.normalize(sums)
        old = self.rows[rows]
        keep = torch.sigmoid((old * mean).sum(1, keepdim=True)) * self.seen[rows].unsqueeze(1)  # a, and 0 for a class not seen yet
        self.rows[rows] = F.normalize(keep * old + (1.0 - keep) * mean)
        self.seen[rows] = True
