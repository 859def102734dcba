"""Pair verification of a run's own weights, by all ranks together: while it trains, and at its end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eval.errors import EvalError
from train.checkpoint_folder import BACKBONE, BACKBONE_EMA
from train.config import EvalConfig
from train.dist import RankError, Ranks
from train.rank_files import pooled_buffers

if TYPE_CHECKING:
    from eval.embedder import Embedder
    from eval.pair_set import PairSet
    from eval.pairs import PairReport
    from train.run import Run

Reports = Mapping[str, "PairReport"]  # by name of the set of pairs


class PairVerification:
    """On the sets of pairs of the recipe's ``eval`` section.

    ``sets``: by name. ``newest``: the reports of the last evaluation, the same on every rank, empty before it; ``step``: of the
    weights that it was of.
    """

    def __init__(self, config: EvalConfig, ranks: Ranks) -> None:
        """Open the sets. Raises RankError on every rank if one cannot be opened on any. Collectives: one gather."""
        self._ranks = ranks
        self.sets = ranks.together(lambda: open_sets(config))
        self.newest: Reports = {}
        self.step = math.nan

    @property
    def score(self) -> float:
        """By which checkpoints are compared: the accuracy, mean over folds and then over sets. NaN before the first evaluation."""
        reports = self.newest.values()
        return sum(report.accuracy.mean for report in reports) / len(reports) if reports else math.nan

    def verify_engine(self, step: int, engine, batch_size: int) -> None:
        """Of the weights that a DeepSpeedEngine trains with, in its precision.

        Neither weights nor random numbers nor BatchNorm statistics are changed. Raises RankError on every rank, if an image cannot be
        embedded. Collectives: a gather of the statistics, those of ``eval.embed.embed``, and a broadcast.
        """
        from eval.embedder import module_embedder  # here, because onnxruntime takes a second to import

        with _pooled_statistics(engine.module, self._ranks):
            self._verify(step, module_embedder(engine, source=f"the backbone at step {step}", batch_size=batch_size))

    def verify_file(self, step: int, weights: Path | None) -> Reports:
        """Of a backbone's weights file, in float32; only rank 0 needs it. Raises RankError. Collectives: as above, and of the weights."""
        from eval.embedder import module_embedder
        from eval.weights import load_backbone

        loaded = self._ranks.together(lambda: load_backbone(weights) if self._ranks.is_first else None)
        preset, embedding_size = self._ranks.broadcast(loaded and (loaded.preset, loaded.net.embedding_size))
        net = (loaded.net if loaded else _empty(preset, embedding_size)).to(self._ranks.device)
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, 0, group=self._ranks.group)
        self._verify(step, module_embedder(net, source=str(weights)))
        return self.newest

    def _verify(self, step: int, embedder: Embedder) -> None:
        from eval.pairs import evaluate_pairs

        try:
            reports = {name: evaluate_pairs(embedder, pairs, group=self._ranks.group) for name, pairs in self.sets.items()}
        except EvalError as error:  # alike on every rank
            raise RankError(str(error)) from error
        self.newest, self.step = self._ranks.broadcast(reports), step


def open_sets(config: EvalConfig) -> dict[str, PairSet]:
    """By name: that of the list of pairs, or of the pack's file, without what follows its first dot. Raises EvalError."""
    from eval.pair_pack import open_pack
    from eval.pairs_file import find_pairs

    opened = [(pack.name, open_pack(pack)) for pack in config.packs]
    if config.pairs:
        listed = find_pairs(config.images, config.pairs)
        opened.insert(0, (listed.origin, listed))
    sets: dict[str, PairSet] = {}
    for file_name, pairs in opened:
        name = file_name.partition(".")[0]
        if name in sets:
            raise EvalError(f"{pairs.source} and {sets[name].source} are both called {name}: rename one, because results go by that name")
        sets[name] = pairs
    return sets


def evaluate(run: Run) -> tuple[Reports, Reports]:
    """Of the last checkpoint's weights, and of its mean weights; empty for what the recipe does not have. Raises RankError.

    Collectives: those of ``PairVerification.verify_file``.
    """
    if run.verification is None:
        return {}, {}

    def reports(name: str) -> Reports:
        run.ranks.say(f"verifying pairs with {name}")
        return run.verification.verify_file(run.step, run.checkpoints.last and run.checkpoints.last / name)

    ema = reports(BACKBONE_EMA) if run.cfg.model.ema_decay is not None else {}
    return reports(BACKBONE), ema


@contextmanager
def _pooled_statistics(module: nn.Module, ranks: Ranks) -> Iterator[None]:
    """For the block BatchNorm's statistics of all ranks, as a checkpoint's backbone has them. Collectives: one gather."""
    buffers = dict(module.named_buffers())
    own = {name: buffer.to("cpu", copy=True) for name, buffer in buffers.items()}
    pooled = pooled_buffers(ranks.gather(own))
    _set(buffers, pooled)
    try:
        yield
    finally:
        _set(buffers, own)


@torch.no_grad()
def _set(buffers: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        buffer.copy_(values[name])


def _empty(preset: str, embedding_size: int) -> nn.Module:
    """A backbone whose weights are to come."""
    from model.vit import build_vit

    with torch.device("meta"):
        net = build_vit(preset, embedding_size=embedding_size)
    return net.to_empty(device="cpu")
