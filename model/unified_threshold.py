"""UniFace's unified cross-entropy: every class against one learned threshold, instead of all against each other.

    L = log(1 + exp(b - z_y)) + sum_{j in S, j != y} log(1 + exp(s cos_j - b))        (UniFace, ICCV 2023)

z_y is the margin-adjusted target logit, and b, one number for the whole run, is learned: b / s is the cosine that tells pairs apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.anchor import AnchorName
from model.kernels.exp_logits import write_own
from model.sharded_softmax import BLOCK_COLUMNS, Batch, Combined, ShardedSoftmax, Targets, softplus


def initial_bias(num_scored: float) -> float:
    """Where the published b starts: ``ln(10 |S|)``, at which the negatives' cosines of 0 lose about 0.1 together."""
    return math.log(10.0 * num_scored)


class ShardedThreshold(ShardedSoftmax):
    """The walk of :class:`ShardedSoftmax` with this loss. It has a single term, and nothing in it can overflow."""

    sums_per_anchor = 2  # losses of the negatives, and their derivatives in -b

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
            part.sub_(self._bias.float())
            sums[0] += softplus(part).sum(1)
            sums[1] += part.sigmoid_().sum(1)
        if exps is not logits:
            exps.copy_(logits)
        self._round(anchor, exps)
        return sums, x.new_zeros(len(x))

    def _combine(self, sums: Tensor, shifts: Tensor, targets: Targets, B: int) -> Combined:
        losses_of_negatives, sigmoids = sums[0]
        (held,), below = targets.held, self._bias - targets.logit[0]
        pull = torch.sigmoid(below)  # -dL/dz_y
        losses = (softplus(below) + losses_of_negatives) * held
        factors = held * (self._objective.scale / B)
        grad_bias = ((pull - sigmoids) * held).sum() / B
        return Combined(losses, factors.unsqueeze(0), (-pull * factors).unsqueeze(0), grad_bias)
