"""UniFace's unified cross-entropy: every class against one learned threshold, instead of all against each other.

    L = log(1 + exp(b - z_y)) + sum_{j in S, j != y} log(1 + exp(s cos_j - b))        (UniFace, ICCV 2023, pp. 20673-20682: L_uce-m)

z_y is the margin-adjusted target logit, and b, one number for the whole run, is learned: b / s is the cosine that tells pairs apart. The
published code clamps ``logit - b`` to [-s, s], beyond which a class has no gradient; here nothing is clamped. Where classes are sampled, b
starts lower, as that code does it (its r; the paper's L_uce-mb-r).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.anchor import AnchorName
from model.kernels.exp_logits import write_own
from model.sharded_softmax import BLOCK_COLUMNS, Batch, Combined, ShardedSoftmax, Targets, softplus


def positive_loss(logit: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(``log(1 + exp(b - z))``, its derivative in z) of target logits of any shape; the derivative in b is the opposite."""
    below = bias - logit
    return softplus(below), -torch.sigmoid(below)


def negative_loss(logit: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(``log(1 + exp(z - b))``, its derivative in z) of negatives' logits of any shape; the derivative in b is the opposite.

    Both are 0 at -inf, which stands for a class that is no negative.
    """
    above = logit - bias
    return softplus(above), torch.sigmoid(above)


def initial_bias(num_scored: float) -> float:
    """Where the published b starts: ``ln(10 |S|)``, at which the negatives' cosines of 0 lose about 0.1 together."""
    return math.log(10.0 * num_scored)


class ShardedThreshold(ShardedSoftmax):
    """The walk of :class:`ShardedSoftmax` with this loss. It has a single term, and nothing in it can overflow."""

    sums_per_anchor = 2  # losses of the negatives, and their derivatives in the logits

    def __init__(self, bias: Tensor, *arguments) -> None:
        """``bias``: b, a tensor of one element; ``arguments``: of :class:`ShardedSoftmax`."""
        super().__init__(*arguments)
        self._bias = bias.double().reshape(())

    def _score(self, name: AnchorName, rows: slice, batch: Batch, exps: Tensor) -> tuple[Tensor, Tensor]:
        """Writes sigmoid(s cos_j - b) to ``exps`` [n, S], 0 in the own column and where a negative is filtered out.

        Returns (row sums of log(1 + exp(s cos_j - b)) and of that sigmoid [2, n], zeros [n]).
        """
        anchor, x = self._anchors[name], batch.samples[rows]
        products = anchor.products
        scaled = products.operand(x * self._objective.scale)
        logits = products.mm(scaled, anchor.operand.T, out=exps if exps.dtype == torch.float32 else None)
        self._filter(logits)
        write_own(logits, anchor.columns[rows], logits.new_full((len(x),), -math.inf))
        sums = x.new_zeros(2, len(x))
        for part in logits.split(BLOCK_COLUMNS, 1):
            losses, slopes = negative_loss(part, self._bias)
            sums[0] += losses.sum(1)
            sums[1] += slopes.sum(1)
            part.copy_(slopes)
        if exps is not logits:
            exps.copy_(logits)
        self._round(anchor, exps)
        return sums, x.new_zeros(len(x))

    def _hardest(self, exps: Tensor, shift: Tensor, batch: Batch) -> Tensor:
        """NaN: a sigmoid near 1 does not tell its argument."""
        return torch.full_like(shift, math.nan)

    def _combine(self, sums: Tensor, shifts: Tensor, targets: Targets, B: int) -> Combined:
        losses_of_negatives, slopes_of_negatives = sums[0]
        (held,) = targets.held
        loss, slope = positive_loss(targets.logit[0], self._bias)
        losses = (loss + losses_of_negatives) * held
        factors = held * (self._objective.scale / B)
        grad_bias = -((slope + slopes_of_negatives) * held).sum() / B
        return Combined(losses, factors.unsqueeze(0), (slope * factors).unsqueeze(0), grad_bias)
