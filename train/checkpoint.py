"""Checkpoints: committed or not there at all. Shards first, then the manifest, then the pointer.

    checkpoints/
      latest                  text: the name of the newest complete checkpoint
      step_00001200/
        rank_00000.pt ...     per rank: its pieces of the backbone's float32 masters and moments (train.engine_state), its rows of the
                              head, the loader's cursor, random state, its BatchNorm statistics, its part of the mean weights
        backbone.safetensors  the whole backbone in float32 under its released key names, for evaluation and release
        backbone_ema.safetensors  the same of the mean weights; with model.ema_decay alone
        manifest.json         what the run was, and size and SHA-256 of every file above; a folder without it is not a checkpoint

A checkpoint is written as ``step_00001200.partial`` and renamed when every file and the manifest are on disk, so a kill at any moment
leaves the checkpoints before it untouched and never one that only looks whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_pipeline.output import replace_file, sync_folder
from train.dist import Ranks
from train.ema import BackboneEma
from train.engine import full_backbone_weights
from train.engine_state import Pieces, Read, engine_state, load_engine_state

BACKBONE, BACKBONE_EMA = "backbone.safetensors", "backbone_ema.safetensors"
_FORMAT = 3
_NAME = re.compile(r"step_\d{8}")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the folder, what was expected, what was found and what to do."""


@dataclass(frozen=True)
class Identity:
    """What must be the same for a checkpoint to be continued bit for bit; plain JSON values. The loader checks the data by itself."""

    world_size: int
    zero_stage: int
    precision: str
    recipe: dict[str, Any]  # RunConfig.mathematics()
    deepspeed: dict[str, Any]  # the sections of its JSON that change numbers

    def differences(self, saved: dict[str, Any], begun: int | None = None) -> list[str]:
        """``key: this run has X, the checkpoint Y`` for every difference, nested keys dotted; of the stages only the first ``begun``."""
        mine, theirs = (_flatten(_cut(identity, begun)) for identity in (json.loads(json.dumps(vars(self))), saved))
        keys = sorted(mine.keys() | theirs.keys())
        return [
            f"{key}: this run has {mine.get(key)}, the checkpoint {theirs.get(key)}" for key in keys if mine.get(key) != theirs.get(key)
        ]


class Checkpoints:
    """The ``checkpoints`` folder of one run."""

    def __init__(self, folder: Path, ranks: Ranks, identity: Identity, keep_last: int, preset: str) -> None:
        """``preset``: name of the backbone in model.vit, for the metadata of the .safetensors."""
        self.folder, self._ranks, self._identity, self._keep_last, self._preset = folder, ranks, identity, keep_last, preset

    def save(self, step: int, engine, ema: BackboneEma | None, rank_state: dict[str, Any], run_state: dict[str, Any]) -> Path:
        """Commit a checkpoint of ``step`` completed optimizer steps and delete those beyond keep_last.

        Args:
            ema: the mean of the engine's weights, where the run keeps one; unchanged afterwards, as the engine is.
            rank_state: this rank's tensors and plain values (torch.save, readable with weights_only).
            run_state: JSON values that are equal on all ranks; rank 0's are kept.

        Raises RankError on every rank if a file cannot be written. Collectives: the gather of the backbone (with ``ema`` two), a gather of
        a line of text after every file.
        """
        name = f"step_{step:08d}"
        final, partial = self.folder / name, self.folder / f"{name}.partial"
        self._ranks.together(lambda: _new_folder(partial) if self._ranks.is_first else None)
        everything = {
            **rank_state,
            "engine": engine_state(engine),
            "buffers": dict(engine.module.named_buffers()),
            "rng": _random_state(self._ranks.device),
            "ema": ema.state() if ema else None,
        }
        self._ranks.together(lambda: torch.save(everything, partial / f"rank_{self._ranks.rank:05d}.pt"))
        self._save_backbone(engine, partial / BACKBONE)
        if ema:
            with ema.swapped_in():
                self._save_backbone(engine, partial / BACKBONE_EMA)
        manifest = {"format": _FORMAT, "step": step, "identity": vars(self._identity), "run": run_state}
        self._ranks.together(lambda: self._commit(partial, final, manifest) if self._ranks.is_first else None)
        return final

    def _save_backbone(self, engine, path: Path) -> None:
        weights = full_backbone_weights(engine, self._ranks.group)
        self._ranks.together(lambda: save_file(weights, path, metadata={"preset": self._preset}) if self._ranks.is_first else None)

    def _commit(self, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        replace_file(partial / "manifest.json", json.dumps({**manifest, "files": _describe(partial)}, indent=1))
        if final.exists():  # damaged: a resume passed it over and came here again
            _delete(final)
        os.replace(partial, final)
        sync_folder(self.folder)
        self._point_to(final.name)
        # Later ones were passed over as damaged; they do not count and are replaced when the run comes to their step.
        for old in [name for name in self._names() if name <= final.name][: -self._keep_last]:
            _delete(self.folder / old)

    def _point_to(self, name: str) -> None:
        replace_file(self.folder / "latest", name + "\n")

    def newest(self) -> Path | None:
        """The newest complete checkpoint, every file checked against the manifest; None if the run has none at all.

        Those passed over are named with the reason. Raises RankError if there are checkpoints but none is complete.
        Collectives: rank 0 reads, one gather and one broadcast.
        """
        name = self._ranks.together(lambda: self._find_newest() if self._ranks.is_first else None)
        name = self._ranks.broadcast(name)
        return self.folder / name if name else None

    def _find_newest(self) -> str | None:
        for stale in [*self.folder.glob("step_*.partial"), *self.folder.glob("step_*.deleted")]:
            shutil.rmtree(stale, ignore_errors=True)
        names = self._names()
        for name in reversed(names):
            problem = _problem(self.folder / name)
            if problem is None:
                self._point_to(name)  # a kill between a commit and its pointer leaves the old one
                return name
            self._ranks.say(f"passing over checkpoint {self.folder / name}: {problem}")
        if names:
            raise CheckpointError(
                f"{self.folder}: no checkpoint here is complete ({len(names)} passed over, reasons above); "
                "repair one, or start again with another output"
            )
        return None

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("step_*") if _NAME.fullmatch(path.name))

    def read(self, checkpoint: Path, *, branch: bool = False) -> Saved:
        """The checkpoint's state for this rank; with ``branch`` stages that had not begun may differ from this run's.

        Raises CheckpointError if it belongs to another run (see :class:`Identity`).
        """
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        begun = _stages_begun(manifest) if branch else None
        if branch and manifest["run"]["stages"]["index"] >= len(self._identity.recipe["stages"]):
            raise CheckpointError(f"{checkpoint}: the stages of this run end before it; keep only earlier checkpoints in the copy")
        differences = self._identity.differences(manifest["identity"], begun)
        if differences:
            raise CheckpointError(
                f"{checkpoint} belongs to another run: {'; '.join(differences)}. Undo the change, or "
                + ("keep only checkpoints before that stage in the copy" if branch else "start anew with another output")
            )
        rank_state = torch.load(checkpoint / f"rank_{self._ranks.rank:05d}.pt", weights_only=True, map_location="cpu")
        return Saved(checkpoint, manifest["step"], rank_state, manifest["run"])


@dataclass(frozen=True)
class Saved:
    """A checkpoint as one rank sees it."""

    folder: Path
    step: int
    rank_state: dict[str, Any]
    run_state: dict[str, Any]

    def restore(self, engine, ema: BackboneEma | None) -> None:
        """Give the engine its weights and optimizer, this rank its BatchNorm statistics, random state and part of the mean weights.

        Collectives: a gather of the low-precision weights.
        """
        state = self.rank_state["engine"]
        load_engine_state(engine, state, _own_pieces(state["pieces"]))
        buffers = dict(engine.module.named_buffers())
        for key, saved in self.rank_state["buffers"].items():
            buffers[key].copy_(saved)
        if ema:
            ema.load_state(self.rank_state["ema"])
        _restore_random_state(self.rank_state["rng"])


def _own_pieces(pieces: Pieces) -> Read:
    def read(kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        piece = pieces[name]
        return piece[kind][start - piece["start"] : stop - piece["start"]]

    return read


def _problem(checkpoint: Path) -> str | None:
    """Why a folder is not a complete checkpoint."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        found, step, files = manifest["format"], manifest["step"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({error})"
    if found != _FORMAT:
        return f"its format is {found}, this version reads {_FORMAT}"
    if checkpoint.name != f"step_{step:08d}":
        return f"its manifest is of step {step}"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"the SHA-256 of {name} is not the manifest's: its content has changed"
    return None


def _new_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, each flushed to disk first."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    for sub in {path.parent for path in files}:
        sync_folder(sub)
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _delete(checkpoint: Path) -> None:
    """Remove a checkpoint; a kill half-way leaves a folder that no longer has a checkpoint's name."""
    doomed = checkpoint.with_name(checkpoint.name + ".deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _stages_begun(manifest: dict[str, Any]) -> int:
    stages = manifest["run"]["stages"]
    return stages["index"] + (manifest["step"] > stages["start"])


def _cut(identity: dict[str, Any], begun: int | None) -> dict[str, Any]:
    recipe = identity["recipe"]
    return {**identity, "recipe": {**recipe, "stages": {str(i): stage for i, stage in enumerate(recipe["stages"][:begun])}}}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {
            key: value for name, sub in tree.items() for key, value in _flatten(sub, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: tree}
