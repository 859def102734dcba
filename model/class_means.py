"""Class centers from the images of their classes: where a head begins that is put on a backbone which knows faces already."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.class_shard import ClassShard, mean_initial_norm, true_rows
from model.collectives import Collectives


class ClassMeans:
    """Sums of unit embeddings over the images of this rank's classes, whichever rank embeds them.

    Memory: one more float32 [c, D] as long as it lives. On a GPU the order of a sum is not fixed: its last bits may be others each time.
    """

    def __init__(self, shard: ClassShard, embedding_size: int, ranks: Collectives, device: torch.device | str = "cpu") -> None:
        self._shard, self._ranks = shard, ranks
        self._sums = torch.zeros(len(shard), embedding_size, device=device)
        self._images = torch.zeros(len(shard), dtype=torch.int64, device=device)
        self._not_finite = torch.zeros((), dtype=torch.int64, device=device)  # images of all ranks

    @torch.no_grad()
    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Take in a batch of every rank.

        Args:
            embeddings: [b, D] floating, not normalised; the same b on every rank.
            labels: [b] int64 global classes; -1: this row is no image, whatever stands in it.
        Collectives: a gather of [b, D] float32 and one of [b] int64.
        """
        gathering, gathering_labels = self._ranks.gather(F.normalize(embeddings.float())), self._ranks.gather(labels)
        samples, gathered = gathering(), gathering_labels()
        self._not_finite += (~samples.isfinite().all(1) & (gathered >= 0)).sum()
        targets = self._shard.localize(gathered)
        own = true_rows(targets >= 0)
        self._sums.index_add_(0, targets[own], samples[own])
        self._images.index_add_(0, targets[own], torch.ones_like(own))

    @torch.no_grad()
    def centers(self, initial: Tensor) -> Tensor:
        """[c, D] float32: the direction of each class's mean, at the mean norm of random centers; rows of ``initial`` [c, D] where a class
        has no image, or its embeddings cancel out.

        That norm decides how far AdamW's first steps, whose length is the learning rate, turn a center.
        """
        norms = torch.linalg.vector_norm(self._sums, dim=1, keepdim=True)
        return torch.where(norms > 0, self._sums / norms * mean_initial_norm(initial.shape[1]), initial)

    def counts(self) -> tuple[int, int, int]:
        """Over all ranks: images, classes that have one, and images whose embedding was not finite. Collectives: a sum of [2] int64."""
        own = torch.stack([self._images.sum(), (self._images > 0).sum()])
        images, classes = self._ranks.sum(own)().tolist()
        return images, classes, int(self._not_finite)
