"""Pair verification of a run's own weights, by all ranks together: while it trains, and at its end."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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

    ``sets``: by name. ``newest``: the reports of the last evaluation, the same on every rank, empty before it and where it had no
    result; ``step``: of the weights that it was of.
    """

    def __init__(self, config: EvalConfig, ranks: Ranks, alive: Callable[[], None] = lambda: None) -> None:
        """Open the sets.

        Args:
            alive: called after every batch on every rank, equally often: an evaluation may take long where a batch must not.
        Raises RankError on every rank if one cannot be opened on any, or is another one there. Collectives: two gathers.
        """
        self._ranks, self._alive = ranks, alive
        self.sets = ranks.together(lambda: open_sets(config))
        _require_equal(self.sets, ranks)
        for pairs in self.sets.values():
            for remark in pairs.remarks():
                ranks.say(f"warning: {remark}")
        self.newest: Reports = {}
        self.step = math.nan

    @property
    def score(self) -> float:
        """By which checkpoints are compared: the accuracy, mean over folds and then over sets. NaN where ``newest`` is empty."""
        reports = self.newest.values()
        return sum(report.accuracy.mean for report in reports) / len(reports) if reports else math.nan

    def verify_engine(self, step: int, engine, batch_size: int, given_up: Callable[[], bool] = lambda: False) -> str | None:
        """Of the weights that a DeepSpeedEngine trains with, in its precision. Returns why there is no result, None where there is one.

        Neither weights nor random numbers nor BatchNorm statistics are changed. Once ``given_up`` says so on any rank, all of them end the
        evaluation some batches later, without a result. Nor is there one if an image cannot be embedded, as by weights that have become
        useless: whether they can be trained on is not for an evaluation to say.

        Collectives: a gather of the statistics, and of every set those of ``eval.embed.embed`` and two gathers; a broadcast.
        """
        from eval.embedder import module_embedder  # here, because onnxruntime takes a second to import

        embedder = module_embedder(engine, source=f"the backbone at step {step}", batch_size=batch_size)
        problem = None
        with _pooled_statistics(engine.module, self._ranks):
            try:
                if not self._verify(step, embedder, given_up):
                    problem = "the run is asked to stop"
            except RankError as error:
                problem = str(error)
        if problem:
            self.newest, self.step = {}, math.nan
        return problem

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

    def _verify(self, step: int, embedder: Embedder, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Returns whether it came to its end. Raises RankError on every rank, if an image cannot be embedded."""
        from eval.pairs import evaluate_pairs

        options = {"group": self._ranks.group, "progress": lambda counted: lambda done, total: self._alive()}
        reports = {}
        for name, pairs in self.sets.items():
            problem = None
            try:
                reports[name] = evaluate_pairs(embedder, _until(given_up, pairs), **options)
            except EvalError as error:  # on every rank if an image cannot be embedded, on the first alone if embeddings cannot be scored
                problem = error
            if any(self._ranks.gather(given_up())):
                return False
            self._ranks.together(partial(_raise, problem))
        self.newest, self.step = self._ranks.broadcast(reports), step
        return True


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


def _require_equal(sets: Mapping[str, PairSet], ranks: Ranks) -> None:
    """Ranks that embed other numbers of images would wait for each other for ever. Raises RankError. Collectives: a gather."""
    found = ranks.gather([(name, len(pairs.images), _digest(pairs)) for name, pairs in sets.items()])
    if strangers := [rank for rank, of_rank in enumerate(found) if of_rank != found[0]]:
        raise RankError(f"eval: the sets of pairs of ranks {strangers} are not those of rank 0: make the files equal on all nodes")


def _digest(pairs: PairSet) -> str:
    """SHA-256 of which images make which pairs."""
    content = hashlib.sha256()
    for array in (pairs.pairs, pairs.same, pairs.fold):
        content.update(array.tobytes())
    return content.hexdigest()


def _until(given_up: Callable[[], bool], pairs: PairSet) -> PairSet:
    """The same pairs, but no image of them can be read any more once ``given_up`` says so: what ends embedding on all ranks alike."""

    def read(image: int) -> bytes:
        if given_up():
            raise EvalError("the evaluation was given up")
        return pairs.images.read(image)

    return replace(pairs, images=replace(pairs.images, read=read))


def _raise(problem: EvalError | None) -> None:
    if problem:
        raise problem


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
