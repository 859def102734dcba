"""What a recipe names: its data and its output."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.fetch import RecordFetcher
from data_pipeline.info import readable
from data_pipeline.loader import select_records
from data_pipeline.shard_set import ShardSet, open_set
from train.checkpoint_folder import POINTER, CheckpointError, pointed_name
from train.checks.finding import Finding, ok, problem, warning
from train.config import DataConfig, RunConfig
from train.lock import writer_of

_TRIED = 256  # records read


def data(config: DataConfig) -> Finding:
    """Open the set as training does, and read records from all over it."""
    cure = "correct data.path (relative to the working directory), or let `python -m data_pipeline verify` find what is wrong"
    if not config.path.exists():
        return problem("data", f"data.path: {config.path} is not there", cure)
    try:
        faces = open_set(config.path)
        _, _, classes = select_records(faces, config.min_images_per_identity)
        damaged = _damaged(faces)
    except (DataError, OSError) as error:
        return problem("data", str(error), cure)
    found = f"{config.path}: {faces.num_images:,} images, {classes:,} identities to train on, {len(faces.shards)} shards"
    tried = min(_TRIED, faces.num_images)
    if damaged:
        text = f"{found}; of {tried} records that were read {len(damaged)} are damaged, such as {damaged[0]}"
        return warning("data", text, f"python -m data_pipeline verify {config.path}")
    if config.num_classes not in (None, classes):
        return problem("data", f"{found}; the recipe says data.num_classes: {config.num_classes:,}", "correct the one or the other")
    return ok("data", f"{found}; {tried} records read, none is damaged")


def count_shards(path: Path) -> int:
    """Files that a loader holds open; 0 where there is no set that it could open."""
    try:
        return len(open_set(path).shards)
    except (DataError, OSError):
        return 0


def _damaged(faces: ShardSet) -> list[str]:
    numbers = np.setdiff1d(np.linspace(0, faces.num_images - 1, min(_TRIED, faces.num_images)).astype(np.int64), faces.excluded)
    return [str(image) for image in RecordFetcher(faces).fetch(numbers) if isinstance(image, DataError)]


def output(cfg: RunConfig) -> Finding:
    """Whether a run may write to ``cfg.output``, and whether it would go on from a checkpoint there."""
    folder: Path = cfg.output
    writer = writer_of(folder)
    if writer:
        return problem("output", f"{folder}: another run is writing there ({writer})", "end it first, or choose another output")
    checkpoints = folder / "checkpoints"
    if (checkpoints / POINTER).exists():
        try:
            found = f"{folder}: a run there has come to {pointed_name(checkpoints / POINTER)}"
        except CheckpointError as error:
            return warning("output", str(error), "the run takes the newest complete checkpoint all the same")
        if cfg.resume == "never":
            return problem("output", f"{found}, and the recipe says resume: never", "choose another output, or resume=auto")
        return ok("output", f"{found} and would be continued")
    if cfg.resume in ("required", "branch"):
        return problem("output", f"{folder}: no checkpoint there, and the recipe says resume: {cfg.resume}", "check output, or resume=auto")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return problem("output", f"{existing} is no folder", "choose another output")
    return ok("output", f"{folder}: a new run would begin there; {readable(shutil.disk_usage(existing).free)} free")
