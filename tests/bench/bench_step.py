"""Where the time of a training step goes: real steps of a recipe, started as a user would, read from the run's own metrics.

    python -m tests.bench.bench_step
    python -m tests.bench.bench_step --ranks 2 --data SHARDS model.name=vit_t batch.micro_batch_size=16

The parts are those of lvface_step_part_seconds_total. ``data_wait`` is what the step waited for its batch, ``comm`` what it waited for
other ranks wherever that was, and ``other`` everything in no part, the log line included. Every stage of the recipe gets a table of its
own, for the head works differently in each. Without --data, synthetic faces are drawn first.

On a machine with GPUs, DS_ACCELERATOR=cpu keeps the run on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from data_pipeline.pack import pack
from data_pipeline.synthetic import write_synthetic
from tests.training import ROOT, free_port
from train.config import load_run_config
from train.timing import PARTS

WINDOW = 5  # steps
SHOWN = (*(part for part in PARTS if part != "checkpoint"), "total")
IDENTITIES, IMAGES = 64, 24  # of the synthetic faces: a step of 2 x 64 images takes less than a tenth of them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "train/recipes/lfw_tiny.yaml")
    parser.add_argument("--deepspeed-config", type=Path, default=ROOT / "ds_configs/zero1_fp32.json")
    parser.add_argument("--ranks", type=int, default=1, help="more than one are started by the deepspeed launcher")
    parser.add_argument("--data", type=Path, help="folder of record shards; default: synthetic faces")
    parser.add_argument("--steps", type=int, default=30, help=f"of each stage; the first {WINDOW} are not counted")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, e.g. model.name=vit_t")
    arguments = parser.parse_intermixed_args()
    if arguments.steps < 2 * WINDOW:
        parser.error(f"--steps must be at least {2 * WINDOW}, got {arguments.steps}")
    with tempfile.TemporaryDirectory(prefix="bench_step_") as folder:
        data = arguments.data or synthetic_shards(Path(folder))
        return measure(arguments, data, Path(folder) / "run")


def synthetic_shards(folder: Path) -> Path:
    write_synthetic(folder / "faces", IDENTITIES, IMAGES, seed=0)
    pack([folder / "faces"], folder / "shards", 2)
    return folder / "shards"


def measure(arguments: argparse.Namespace, data: Path, output: Path) -> int:
    """Train, print the tables; the exit code."""
    overrides = [f"data.path={data}", f"output={output}", *short_run(arguments.recipe, arguments.steps), *arguments.overrides]
    launcher = [sys.executable, "-m"]
    if arguments.ranks > 1:
        launcher += ["deepspeed.launcher.runner", "--num_gpus", str(arguments.ranks), "--master_port", str(free_port()), "--module"]
    configs = ["--config", str(arguments.recipe), "--deepspeed_config", str(arguments.deepspeed_config)]
    command = [*launcher, "train", *configs, *overrides]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    if not (output / "summary.json").exists():  # the launcher's exit code is 0 even where a rank was killed
        print(result.stdout, result.stderr, sep="\n")
        return 1
    what = next(line for line in result.stdout.splitlines() if " M parameters), " in line)
    cfg = load_run_config(output / "recipe.yaml")
    print(f"{what}; micro_batch_size {cfg.batch.micro_batch_size}, grad_accum_steps {cfg.batch.accumulation(arguments.ranks)}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for stage in cfg.stages:
        print_stage([line for line in lines if line["stage_name"] == stage.name])
    return 0


def short_run(recipe: Path, steps: int) -> list[str]:
    """Overrides that give every stage so many steps and leave out what is not training."""
    quiet = ["epochs=null", "eval=null", "resume=never", "metrics.port=0", f"metrics.log_every={WINDOW}", "checkpoint.every_steps=null"]
    quiet += ["schedule.warmup_epochs=0", "schedule.warmup_steps=null"]
    needed = ["data.path=.", "output=."]  # what a recipe may leave to the command line
    for index in range(len(load_run_config(recipe, needed).stages)):
        quiet += [f"stages.{index}.epochs=null", f"stages.{index}.steps={steps}"]
    return quiet


def print_stage(windows: list[dict]) -> None:
    """Time per step of every part, the median over the windows but the first: that one warms up, or saved the stage before."""
    seconds = [window["step_seconds"] for window in windows[1:]]
    median = {part: statistics.median(parts[part] for parts in seconds) for part in SHOWN}
    print(f"\nstage {windows[0]['stage_name']}, median of {len(seconds)} windows of {WINDOW} steps\n  part             ms    share")
    for part, taken in median.items():
        print(f"  {part:<10}{1000 * taken:>9.2f}{taken / median['total']:>9.2%}")


if __name__ == "__main__":
    sys.exit(main())
