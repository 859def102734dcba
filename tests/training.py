"""Small training runs for tests: a set of synthetic faces, a recipe that uses everything random, and a way to run it in this process."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file

from data_pipeline.pack import pack
from data_pipeline.synthetic import write_synthetic
from model.vit import build_vit

ROOT = Path(__file__).resolve().parents[1]
IDENTITIES, IMAGES = 48, 2


def free_port() -> int:
    """A port p such that p + 1 is free too: the exporter of the next rank listens there."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def packed_faces(folder: Path) -> Path:
    """96 synthetic images of 48 identities in 2 shards: a batch meets fewer than half of them, so a sample of half has negatives."""
    write_synthetic(folder / "faces", IDENTITIES, IMAGES, seed=0)
    pack([folder / "faces"], folder / "shards", 2)
    return folder / "shards"


def write_recipe(path: Path, data: Path, output: Path, **changes) -> Path:
    """A recipe of 8 steps on 2 ranks: 4 early and sampled, 4 stable with expectations; 6 micro-batches an epoch, 2 a step.

    Dropped patches and paths, flips, shifts and brightness are all on: a resume must continue every one of their generators.
    """
    recipe = {
        "output": str(output),
        "model": {"name": "vit_xxt", "embedding_size": 32, "mask_ratio": 0.2, "drop_path": 0.2, "ema_decay": 0.9},
        "head": {"margin": {"m1": 1.0, "m2": 0.3, "m3": 0.1, "curricular": True}, "scale": 16.0},
        "data": {"path": str(data), "num_threads": 1, "augment": {"flip": 0.5, "shift_px": 3, "brightness": 0.2}},
        "batch": {"micro_batch_size": 8, "grad_accum_steps": 2},
        "schedule": {"warmup_steps": 2},
        "stages": [
            {"name": "early", "steps": 4, "sample_rate": 0.5, "update_expectation": True},
            {"name": "stable", "steps": 4, "centers": "pco", "update_expectation": True},
        ],
        "checkpoint": {"every_steps": 3, "keep_last": 9},
        "metrics": {"port": 0, "log_every": 1},
        **changes,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def given_weights(folder: Path) -> tuple[str, Path]:
    """An override that gives the backbone of :func:`write_recipe` weights to begin with, and their file. No seed of a recipe makes them."""
    torch.manual_seed(77)
    net = build_vit("vit_xxt", embedding_size=32)
    net.feature[1].running_mean.uniform_(-1, 1)
    net.feature[3].running_var.uniform_(0.5, 2)
    save_file(net.state_dict(), folder / "given.safetensors")
    return f"model.init_from={folder / 'given.safetensors'}", folder / "given.safetensors"


def recipe_for(world_size: int, *arguments, **changes) -> Path:
    """:func:`write_recipe` for 1, 2 or 4 ranks: the same 32 images a step in two micro-batches."""
    return write_recipe(*arguments, **{"batch": {"micro_batch_size": 16 // world_size, "grad_accum_steps": 2}, **changes})


def train_on_rank(group, recipe: Path, ds_config: str, overrides=(), kill=None) -> int:
    """Train as ``python -m train`` would on this rank; returns the step reached. What it reads is noted for :func:`images_read`.

    ``kill=(rank, step)``: that rank kills itself with SIGKILL when it has taken that many steps. ``kill=(rank, "within", step)``: it does
    within that step, before it reads the second micro-batch. ``kill=(0, "save", n)``: rank 0 does in the middle of its n-th save of this
    process, when the ranks' files are written and the manifest is not.
    """
    from train.build import build_run
    from train.checkpoint_folder import CheckpointFolder
    from train.config import load_run_config
    from train.dist import Ranks
    from train.ds_config import load_ds_config
    from train.loop import train
    from train.stop import StopRequests
    from train.watchdog import Watchdog

    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    ranks = Ranks(rank, rank, world_size, world_size, torch.device("cpu"), group)
    cfg = load_run_config(recipe, overrides)
    ds, summary = load_ds_config(ROOT / "ds_configs" / ds_config, cfg, world_size, "cpu")
    watchdog = Watchdog(cfg.watchdog, ranks, cfg.output / "stacks")
    run = build_run(cfg, ds, summary, ranks, StopRequests(), watchdog)
    kill = kill[1:] if kill and kill[0] == rank else [None]
    _note_reads(run, kill[1] if kill[0] == "within" else None)
    if kill[0] == "save":
        commit, saves = CheckpointFolder.commit, iter(range(1, 100))
        CheckpointFolder.commit = lambda *args: _die() if next(saves) == kill[1] else commit(*args)
    elif isinstance(kill[0], int):
        record = run.record
        run.record = lambda *args: (record(*args), run.step == kill[0] and _die())
    train(run)
    run.close()
    return run.step


def _note_reads(run, last_step: int | None) -> None:
    """Write down what every micro-batch of this process holds; die before the second one of ``last_step``."""
    from data_pipeline.loader import FaceLoader

    following, file = FaceLoader.__next__, (run.cfg.output / f"reads_{run.ranks.rank}.jsonl").open("a")
    step = micro_batch = 0

    def noted(self):
        nonlocal step, micro_batch
        micro_batch = micro_batch + 1 if run.step + 1 == step else 1
        step = run.step + 1
        if (step, micro_batch) == (last_step, 2):
            _die()
        batch = following(self)
        file.write(json.dumps([step, micro_batch, batch.records()]) + "\n")
        file.flush()
        return batch

    FaceLoader.__next__ = noted


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def losses(output: Path) -> dict[int, float]:
    """Loss of every step, the last word on a step that was taken twice."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def images_read(output: Path, rank: int) -> dict[tuple[int, int], list[str]]:
    """(step, micro-batch) -> names of the records that the rank trained on, the last word on a step that was taken twice."""
    lines = map(json.loads, (output / f"reads_{rank}.jsonl").read_text().splitlines())
    return {(step, micro_batch): records for step, micro_batch, records in lines}


def final_state(output: Path, rank: int) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint that rank restores, and the backbone in float32."""
    from safetensors.torch import load_file

    folder = output / "checkpoints" / (output / "checkpoints" / "latest").read_text().strip()
    state = torch.load(folder / f"rank_{rank:05d}.pt", weights_only=True)
    ema = {f"ema.{name}": tensor for name, tensor in load_file(folder / "backbone_ema.safetensors").items()}
    random = {"torch": state["random"]["torch"], "numpy": state["random"]["numpy"][1]}
    pieces = {
        f"{name}.{kind}": value
        for name, piece in state["engine"]["pieces"].items()
        for kind, value in piece.items()
        if isinstance(value, torch.Tensor)
    }
    return {**load_file(folder / "backbone.safetensors"), **ema, **state["head"], **state["buffers"], **random, **pieces}


def check_same_run(output: Path, expected: Path, world_size: int = 2) -> None:
    """Every loss and every tensor of the last checkpoint is that of the run at ``expected``, bit for bit."""
    assert losses(output) == losses(expected)
    backbone = "checkpoints/step_00000008/backbone.safetensors"
    assert (output / backbone).read_bytes() == (expected / backbone).read_bytes()
    for rank in range(world_size):
        mine, theirs = final_state(output, rank), final_state(expected, rank)
        assert mine.keys() == theirs.keys()
        assert not [name for name, value in theirs.items() if not torch.equal(mine[name], value)], f"rank {rank}"
