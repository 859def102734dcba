"""What a checkpoint costs training: the time that it stands still, against a save that is waited for and against bare copies in memory.

    python -m tests.bench.bench_checkpoint
    python -m tests.bench.bench_checkpoint --ranks 2 --model vit_s --classes 400000 --folder /mnt/checkpoints

Saves take turns: one that is waited for, then one in the background beside training steps. What was saved is read again first and compared
with the state, value by value. Steps beside a save compete with it for cores, disk and memory: how much longer they take is printed too;
on a machine with no core to spare that is more than the save itself holds up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from model.partial_fc import PartialFC
from model.vit import build_vit
from tests.ranks import run_ranks
from tests.training import ROOT
from train.checkpoint import Checkpoints, Identity, Layout
from train.checkpoint_folder import Retention
from train.config import RunConfig
from train.dist import Ranks
from train.ds_config import load_ds_config
from train.engine import build_engine, build_optimizer
from train.engine_state import engine_state
from train.host_copy import HostCopy, tensor_bytes

D, BATCH = 512, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", default="vit_t", help="preset of model.vit")
    parser.add_argument("--classes", type=int, default=64_374, help="over all ranks; default: 2,059,906 / 64 on each of two")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=arguments.folder) as folder:
        what = (Path(folder), arguments.model, arguments.classes, arguments.repeats)
        results = run_ranks(arguments.ranks, measure, *what, timeout_s=3600)
    size = sum(result["bytes"] for result in results)
    print(f"{arguments.ranks} ranks, {arguments.model}, {arguments.classes:,} classes, {size / 1e6:,.0f} MB of state, saved = read")
    # All ranks wait for the slowest.
    slowest = {name: [max(values) for values in zip(*(result[name] for result in results), strict=True)] for name in results[0]["times"]}
    median = {name: statistics.median(values) for name, values in slowest.items()}
    print(f"median of {arguments.repeats}    ms     of a save that is waited for")
    for name, seconds in median.items():
        print(f"{name:<16}{1e3 * seconds:>10.1f}{seconds / median['waited for']:>12.3f}")
    return 0


def measure(group: dist.ProcessGroup, folder: Path, model: str, classes: int, repeats: int) -> dict:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    ranks = Ranks(rank, rank, world_size, world_size, torch.device("cpu"), group)
    stages = [{"name": "only", "steps": 1}]
    values = {"output": "unused", "data": {"path": "unused"}, "batch": {"micro_batch_size": BATCH}, "stages": stages}
    cfg = RunConfig.model_validate(values)
    ds_config, summary = load_ds_config(ROOT / "ds_configs/zero1_bf16.json", cfg, world_size, "cpu")
    backbone = build_vit(model, embedding_size=D)
    engine = build_engine(backbone, build_optimizer(backbone, cfg.optimizer), ds_config)
    head = PartialFC(D, classes, 0.1, group=group)
    checkpoints = Checkpoints(
        folder, ranks, Identity("bf16", {"stages": []}, {}), Layout(world_size, summary.zero_stage, [BATCH]), Retention(1), model
    )
    images, labels = torch.randn(BATCH, 3, 112, 112), torch.randint(0, classes, (BATCH,))

    def step() -> None:
        engine.backward(head(engine(images), labels))
        engine.step()
        head.step(1e-3, 0.1)

    def save(number: int) -> None:
        state = {"head": head.state(), "num_classes": classes}
        checkpoints.save(number, engine, None, state, {"stages": {"index": 0, "start": 0}})

    step()
    save(0)
    checkpoints.finish()
    check_saved(checkpoints, engine, head)
    times = {name: [] for name in ("waited for", "blocked", "copies alone", "step", "step beside it")}
    copy = HostCopy()
    for number in range(1, repeats + 1):
        step()
        dist.barrier()
        with clock(times["waited for"]):
            save(number)
            checkpoints.finish()
        with clock(times["step"]):
            step()
        dist.barrier()
        with clock(times["blocked"]):
            save(1000 + number)
        with clock(times["step beside it"]):
            step()
        checkpoints.finish()
        with clock(times["copies alone"]):
            copy.of([engine_state(engine), head.state()])
    checkpoints.close()
    return {"bytes": tensor_bytes([engine_state(engine), head.state()]), "times": list(times), **times}


class clock:
    """Seconds of the block, added to a list."""

    def __init__(self, times: list[float]) -> None:
        self._times = times

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._times.append(time.perf_counter() - self._begin)


def check_saved(checkpoints: Checkpoints, engine, head: PartialFC) -> None:
    saved = checkpoints.read(checkpoints.newest())
    for name, value in head.state().items():
        assert torch.equal(saved.rank_state["head"][name], value), name
    for name, piece in engine_state(engine)["pieces"].items():
        for kind, value in piece.items():
            if kind != "start":
                start = piece["start"]
                assert torch.equal(saved.files.piece(kind, name, start, start + len(value)), value), (name, kind)


if __name__ == "__main__":
    sys.exit(main())
