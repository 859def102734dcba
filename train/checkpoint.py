"""Save a run while it goes on, and read it again, at any number of ranks. What lies on the disk: train.checkpoint_folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.output import replace_file
from train.checkpoint_folder import (
    BACKBONE,
    BACKBONE_EMA,
    CheckpointError,
    CheckpointFolder,
    HashedFile,
    Manifest,
    Retention,
    free_bytes,
    read_manifest,
)
from train.dist import Ranks
from train.ema import BackboneEma
from train.engine import loss_scale
from train.engine_state import engine_state, load_engine_state, local_masters
from train.host_copy import HostCopy, tensor_bytes
from train.random_state import random_state, restore_random_state, seed_rank
from train.rank_files import RankFiles, RankState, file_name

_POLL_S = 0.02


@dataclass(frozen=True)
class Identity:
    """What must be the same for a checkpoint to be continued; plain JSON values. The loader checks the data by itself.

    A key of the recipe that a checkpoint does not know is younger than it, and counts as equal at its default: with that a run computes
    what runs computed before there was the key.
    """

    precision: str
    recipe: dict[str, Any]  # RunConfig.mathematics(), with every stage's global batch
    deepspeed: dict[str, Any]  # the sections of its JSON that change numbers
    chosen: dict[str, Any] | None = None  # of the recipe what is not at its default; None: all of it is not

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"precision": self.precision, "recipe": self.recipe, "deepspeed": self.deepspeed}

    def differences(self, saved: dict[str, Any], begun: int | None = None) -> list[str]:
        """``key: this run has X, the checkpoint Y`` for every difference, nested keys dotted; of the stages only the first ``begun``."""
        own = json.loads(json.dumps(self.saved()))
        chosen = own if self.chosen is None else {**own, "recipe": self.chosen}
        mine, theirs, chosen = (_flatten(_cut(identity, begun)) for identity in (own, saved, chosen))
        younger = {key for key in mine.keys() - theirs.keys() - chosen.keys() if theirs.keys().isdisjoint(_above(key))}
        keys = sorted((mine.keys() | theirs.keys()) - younger)
        return [
            f"{key}: this run has {mine.get(key)}, the checkpoint {theirs.get(key)}" for key in keys if mine.get(key) != theirs.get(key)
        ]


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks. With the same layout it goes on bit for bit; with another one up to rounding and random draws."""

    world_size: int
    zero_stage: int
    micro_batch_sizes: list[int]  # of each stage

    def change(self, saved: dict[str, Any]) -> str | None:
        """``2 ranks, ZeRO 1, micro-batches of 8, 8``: the saved layout, if it is another one."""
        if vars(self) == saved:
            return None
        sizes = ", ".join(map(str, saved["micro_batch_sizes"]))
        return f"{saved['world_size']} ranks, ZeRO {saved['zero_stage']}, micro-batches of {sizes}"


@dataclass
class SaveReport:
    """How the newest save went on this rank; NaN before it. What only rank 0 knows is NaN on the others."""

    blocked_seconds: float = math.nan  # in which training stood still
    write_seconds: float = math.nan  # from its begin until this rank's file, on rank 0 the whole checkpoint, was on the disk
    step: float = math.nan  # of the newest committed checkpoint; rank 0
    timestamp_seconds: float = math.nan  # when it was committed, since 1970; rank 0
    size_bytes: float = math.nan  # of its files; rank 0
    score: float = math.nan  # its; rank 0
    free_bytes: float = math.nan  # on its file system afterwards; rank 0


class Checkpoints:
    """Saves the run in a thread of its own: training waits for the copy to host memory alone, and for the save before if it still runs."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        identity: Identity,
        layout: Layout,
        retention: Retention,
        preset: str,
    ) -> None:
        """``preset``: name of the backbone in model.vit, for the metadata of the .safetensors. Collectives: one broadcast."""
        self.folder, self.report = CheckpointFolder(folder, ranks.say), SaveReport()
        self.last: Path | None = None  # the newest that this process committed (on rank 0) or went on from
        self._ranks, self._identity, self._layout, self._retention = ranks, identity, layout, retention
        self._preset = preset
        self._token = ranks.broadcast(secrets.token_hex(4))
        self._host = HostCopy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._abandoned = threading.Event()
        self._size = 0  # bytes of the next checkpoint
        self._written: Future | None = None  # this rank's file
        self._committed: Future | None = None  # on rank 0: all of it

    def save(
        self, step: int, engine, ema: BackboneEma | None, rank_state: RankState, run_state: dict[str, Any], score: float | None = None
    ) -> None:
        """Begin a checkpoint of ``step`` completed optimizer steps; :meth:`finish` ends it, at the latest the next save.

        Args:
            rank_state: this rank's tensors and plain values (torch.save, readable with weights_only); copied before this returns.
            run_state: JSON values that are equal on all ranks; rank 0's are kept.
            score: of these weights, higher is better, by which checkpoints are kept; None: nobody knows.

        Raises RankError on every rank if the save before failed, or there is no room for this one. Collectives: two gathers, and those of
        finish and require_space.
        """
        begin = time.monotonic()
        self.finish()
        self.require_space(engine, ema, rank_state)
        state = {
            **rank_state,
            "engine": engine_state(engine, ema and ema.means),
            "buffers": dict(engine.module.named_buffers()),
            "ema": ema and ema.state(),
            "random": random_state(self._ranks.device),
        }
        self._ranks.together(lambda: self.folder.new_partial(step, self._token) if self._ranks.is_first else None)
        manifest = {
            "step": step,
            "identity": self._identity.saved(),
            "recipe_sha256": _digest(self._identity.recipe),
            "layout": vars(self._layout),
            "data": {name: value for name, value in rank_state.get("loader", {}).items() if name in ("images", "fingerprint")},
            "loss_scale": loss_scale(engine),
            "random": sorted(state["random"]),
            "run": run_state,
            "score": score,
        }
        state = self._host.of(state)
        partial = self.folder.partial(step, self._token)
        self.report.blocked_seconds = time.monotonic() - begin  # but for the handing over
        self._written = self._thread.submit(self._write, partial, state, begin)
        if self._ranks.is_first:
            self._committed = self._thread.submit(self._commit, partial, manifest, begin)

    @property
    def failed(self) -> bool:
        """Whether a file of this rank could not be written since the last :meth:`finish`, which will say so on all ranks."""
        return any(future is not None and future.done() and future.exception() is not None for future in (self._written, self._committed))

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is committed.

        Raises RankError on every rank if it could not be. Collectives: two gathers, where one was begun.
        """
        written, committed, self._written, self._committed = self._written, self._committed, None, None
        if written is None:
            return
        try:
            self._ranks.together(written.result)
            self._ranks.together(lambda: committed.result() if committed else None)
        except ValueError:
            self._abandoned.set()
            raise

    def close(self) -> None:
        """End the thread; a checkpoint that was not finished is given up."""
        self._abandoned.set()
        self._thread.shutdown()

    def require_space(self, engine, ema: BackboneEma | None, rank_state: RankState) -> None:
        """Raises RankError on every rank unless the next checkpoint fits on the file system. Collectives: two gathers."""
        own = tensor_bytes(rank_state) + 4 * (4 if ema else 3) * sum(master.numel() for master in local_masters(engine))
        backbone = 4 * (2 if ema else 1) * sum(getattr(weight, "ds_numel", weight.numel()) for weight in engine.module.parameters())
        self._size = sum(self._ranks.gather(own)) + backbone

        def check() -> None:
            free = free_bytes(self.folder.path)
            if free < self._size:
                raise CheckpointError(
                    f"{self.folder.path}: a checkpoint of this run takes {_gb(self._size)}, and {_gb(free)} are free; free some, keep "
                    "fewer (checkpoint.keep_last, keep_every_steps, keep_best), or choose another output"
                )

        self._ranks.together(lambda: check() if self._ranks.is_first else None)

    def _write(self, partial: Path, state: RankState, begin: float) -> None:
        """This rank's file, and beside it what the manifest says of it, by which rank 0 knows that it is on the disk."""
        path = partial / file_name(self._ranks.rank)
        file = HashedFile(path)
        try:
            with file:
                torch.save(state, file)
            replace_file(path.with_name(f"{path.name}.json"), json.dumps(file.description()))
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of what the file raises
            raise CheckpointError(_not_written(path, file.error or error)) from error
        self.report.write_seconds = time.monotonic() - begin

    def _commit(self, partial: Path, manifest: Manifest, begin: float) -> None:
        files = self._await_rank_files(partial)
        try:
            rank_files = RankFiles(partial, self._ranks.world_size)
            files[BACKBONE] = self._write_backbone(partial / BACKBONE, rank_files.backbone())
            if rank_files.of(0)["ema"]:
                files[BACKBONE_EMA] = self._write_backbone(partial / BACKBONE_EMA, rank_files.backbone("mean"))
            self.last = self.folder.commit(partial, {**manifest, "files": files}, self._retention)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(_not_written(partial, error)) from error
        free, report = free_bytes(self.last), self.report
        report.write_seconds, report.step, report.free_bytes = time.monotonic() - begin, manifest["step"], free
        report.timestamp_seconds, report.size_bytes = time.time(), sum(entry["bytes"] for entry in files.values())
        score = manifest["score"]
        report.score = math.nan if score is None else score
        scored = "" if score is None else f", score {score:.4f}"
        self._ranks.say(f"checkpoint {self.last} ({report.write_seconds:.1f} s, training waited {report.blocked_seconds:.2f} s{scored})")
        if free < self._size:
            self._ranks.say(f"warning: {_gb(free)} are free in {self.folder.path}, and the next checkpoint takes {_gb(self._size)}")

    def _await_rank_files(self, partial: Path) -> dict[str, dict[str, Any]]:
        """The manifest's entries of all ranks' files."""
        files = {}
        for rank in range(self._ranks.world_size):
            description = partial / f"{file_name(rank)}.json"
            while not description.exists():
                if self._abandoned.wait(_POLL_S):
                    raise CheckpointError(f"{partial}: given up, because another rank could not write its file")
            files[file_name(rank)] = json.loads(description.read_text())
            description.unlink()
        return files

    def _write_backbone(self, path: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
        fresh = path.with_name(f".{path.name}.new")
        save_file(weights, fresh, metadata={"preset": self._preset})
        shutil.copymode(path.with_name(file_name(0)), fresh)  # safetensors makes files that only their owner reads
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
            entry = {"bytes": fresh.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        os.replace(fresh, path)
        return entry

    def newest(self, before: int | None = None) -> Path | None:
        """See :meth:`CheckpointFolder.newest`. Raises RankError. Collectives: rank 0 reads, one gather and one broadcast."""
        newest = self._ranks.together(lambda: self.folder.newest(before) if self._ranks.is_first else None)
        return self._ranks.broadcast(newest)

    def read(self, checkpoint: Path, *, branch: bool = False) -> Saved:
        """The checkpoint's state for this rank; with ``branch`` stages that had not begun may differ from this run's.

        Raises CheckpointError if it belongs to another run (see :class:`Identity`).
        """
        manifest = read_manifest(checkpoint)
        begun = _stages_begun(manifest) if branch else None
        if branch and manifest["run"]["stages"]["index"] >= len(self._identity.recipe["stages"]):
            raise CheckpointError(f"{checkpoint}: the stages of this run end before it; keep only earlier checkpoints in the copy")
        differences = self._identity.differences(manifest["identity"], begun)
        if differences:
            raise CheckpointError(
                f"{checkpoint} belongs to another run: {'; '.join(differences)}. Undo the change, or "
                + ("keep only checkpoints before that stage in the copy" if branch else "start anew with another output")
            )
        old, rank, world_size = manifest["layout"], self._ranks.rank, self._ranks.world_size
        files = RankFiles(checkpoint, old["world_size"], nearest=min(rank, old["world_size"] - 1))
        return Saved(checkpoint, manifest["step"], files, files.state_for(rank, world_size), manifest["run"], self._layout.change(old))


@dataclass(frozen=True)
class Saved:
    """A checkpoint as one rank sees it."""

    folder: Path
    step: int
    files: RankFiles = field(repr=False)
    rank_state: RankState = field(repr=False)
    run_state: dict[str, Any] = field(repr=False)
    moved: str | None  # the layout of the run that saved it, if that is another one

    def restore(self, engine, ema: BackboneEma | None, seed: int, rank: int) -> None:
        """Give the engine its weights and optimizer, this rank its BatchNorm statistics, random state and part of the mean weights.

        At another world size the rank's generators are seeded anew, with ``seed``. Collectives: a gather of the low-precision weights.
        """
        load_engine_state(engine, self.rank_state["engine"], self.files.piece, ema and ema.means)
        buffers = dict(engine.module.named_buffers())
        for key, saved in self.rank_state["buffers"].items():
            buffers[key].copy_(saved)
        if ema:
            ema.load_state(self.rank_state["ema"])
        if self.rank_state["random"] is None:
            seed_rank(seed, rank, self.step)
        else:
            restore_random_state(self.rank_state["random"])


def _not_written(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"{path}: cannot be written ({reason}; {_gb(free_bytes(path.parent))} are free); the checkpoints before it are whole: mend that "
        "and start again"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.3f} GB"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _stages_begun(manifest: dict[str, Any]) -> int:
    stages = manifest["run"]["stages"]
    return stages["index"] + (manifest["step"] > stages["start"])


def _cut(identity: dict[str, Any], begun: int | None) -> dict[str, Any]:
    recipe = identity["recipe"]
    return {**identity, "recipe": {**recipe, "stages": {str(i): stage for i, stage in enumerate(recipe["stages"][:begun])}}}


def _above(key: str) -> list[str]:
    """``a`` and ``a.b`` of ``a.b.c``: the sections that it stands in."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {
            key: value for name, sub in tree.items() for key, value in _flatten(sub, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: tree}
