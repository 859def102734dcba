"""``python -m train reshard``: rewrite a checkpoint as another number of ranks would have saved it.

A run goes on from the checkpoint of any number of ranks and of any ZeRO stage by itself. Rewritten beforehand, each rank opens its own
file or a few, not all that hold something of it.
"""

from __future__ import annotations

import argparse
import math
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from train.checkpoint_folder import (
    BACKBONE,
    BACKBONE_EMA,
    CheckpointError,
    CheckpointFolder,
    HashedFile,
    Retention,
    pointed_name,
    problem_of,
    read_manifest,
)
from train.rank_files import RankFiles, file_name
from train.table import format_seconds

_ERROR = 2
_COPY_BYTES = 2**22  # at a time


def reshard(checkpoint: Path, output: Path, world_size: int, say: Callable[[str], None] = print) -> Path:
    """Write ``output/checkpoints/STEP``, which ``world_size`` ranks go on from as they would from ``checkpoint``, bit for bit.

    Each rank's file gets the rows of its classes and an equal part of every parameter, which is what a run of any ZeRO stage can read. One
    rank's file is in memory at a time; of the old files only what goes into it is read.

    Raises: CheckpointError if the checkpoint is not complete, or ``output`` has checkpoints already.
    """
    problem = problem_of(checkpoint)
    if problem:
        raise CheckpointError(f"{checkpoint}: {problem}")
    manifest = read_manifest(checkpoint)
    folder = CheckpointFolder(output / "checkpoints", say)
    if folder.path.exists() and any(folder.path.iterdir()):
        raise CheckpointError(f"{folder.path}: holds something already; choose another output")
    old = RankFiles(checkpoint, manifest["layout"]["world_size"])
    partial = folder.new_partial(manifest["step"], secrets.token_hex(4))
    begin, files = time.monotonic(), {}
    for rank in range(world_size):
        state = old.state_for(rank, world_size)
        state = {**state, "engine": {**state["engine"], "pieces": _equal_part(old, rank, world_size)}}
        with HashedFile(partial / file_name(rank)) as file:
            torch.save(state, file)
        files[file_name(rank)] = file.description()
        left = (time.monotonic() - begin) / (rank + 1) * (world_size - rank - 1)
        say(f"rank {rank + 1}/{world_size}  {files[file_name(rank)]['bytes'] / 1e9:.3f} GB  ETA {format_seconds(left)}")
    for name in (BACKBONE, BACKBONE_EMA):  # the whole backbone is the same for any number
        if name in manifest["files"]:
            with (checkpoint / name).open("rb") as source, HashedFile(partial / name) as file:
                shutil.copyfileobj(source, file, _COPY_BYTES)
            files[name] = file.description()
    layout = {**manifest["layout"], "world_size": world_size}
    return folder.commit(partial, {**manifest, "layout": layout, "files": files}, Retention())


def _equal_part(old: RankFiles, rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    engine = old.of(0)["engine"]
    kinds = ["master", *engine["moments"], *(["mean"] if old.of(0)["ema"] else [])]
    pieces = {}
    for name, shape in engine["shapes"].items():
        elements = math.prod(shape)
        size = -(-elements // world_size)
        start, stop = min(rank * size, elements), min((rank + 1) * size, elements)
        if start < stop:
            pieces[name] = {"start": start, **{kind: old.piece(kind, name, start, stop) for kind in kinds}}
    return pieces


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 something given is wrong (one line on stderr)."""
    parser = argparse.ArgumentParser(
        "train reshard",
        description="Rewrite a checkpoint as another number of ranks would have saved it. A run reads the checkpoints of any number of "
        "ranks and any ZeRO stage without it; rewritten, each rank opens few files. The run that goes on needs the same recipe, and a "
        "global batch as before (batch.global_batch_size).",
    )
    parser.add_argument("run", type=Path, help="output of a run, of which the checkpoint that `latest` names is taken; or a checkpoint")
    parser.add_argument("output", type=Path, help="output of the run that will go on; without checkpoints yet")
    parser.add_argument("--world-size", type=int, required=True, help="ranks")
    arguments = parser.parse_args(argv)
    if arguments.world_size < 1:
        parser.error(f"--world-size: must be at least 1, got {arguments.world_size}")
    try:
        checkpoint = arguments.run
        if (checkpoint / "checkpoints").is_dir():
            checkpoint = checkpoint / "checkpoints" / pointed_name(checkpoint / "checkpoints" / "latest")
        print(reshard(checkpoint, arguments.output, arguments.world_size))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _ERROR
    return 0
