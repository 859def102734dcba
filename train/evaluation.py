"""Pair verification of a run's own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from train.checkpoint_folder import BACKBONE, BACKBONE_EMA
from train.config import EvalConfig

if TYPE_CHECKING:
    from eval.pairs import PairReport
    from train.run import Run


class PairVerification:
    """On the pairs of the recipe's ``eval`` section. ``newest``: the last report, or None."""

    def __init__(self, config: EvalConfig) -> None:
        self._config = config
        self.newest: PairReport | None = None

    def verify(self, weights: Path) -> PairReport:
        """Of a backbone's weights file. Raises EvalError."""
        from eval.embedder import load_embedder  # here, because onnxruntime takes a second to import
        from eval.pairs import evaluate_pairs
        from eval.pairs_file import find_pairs

        self.newest = evaluate_pairs(load_embedder(weights), find_pairs(self._config.images, self._config.pairs))
        return self.newest

    def accuracy(self, weights: Path) -> float:
        """The mean over folds, by which checkpoints are compared."""
        return self.verify(weights).accuracy.mean


def evaluate(run: Run) -> tuple[PairReport | None, PairReport | None]:
    """Of the last checkpoint's weights, and of its mean weights; None for what the recipe does not have."""
    cfg = run.cfg

    def report(name: str) -> PairReport:
        run.ranks.say(f"verifying the pairs of {cfg.eval.pairs} with {name}")
        return run.verification.verify(run.checkpoints.last / name)

    pairs = report(BACKBONE) if cfg.eval else None
    pairs_ema = report(BACKBONE_EMA) if cfg.eval and cfg.model.ema_decay is not None else None
    return pairs, pairs_ema
