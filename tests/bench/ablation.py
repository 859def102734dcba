"""What the stages bring on real faces: lfw_tiny's variants over several seeds, one table, one picture of class centers and expectations.

    python -m tests.bench.ablation --data SHARDS --images FACES --pairs pairs.txt

For each seed ``plain`` and ``pco`` train from the start. The other variants have pco's early stage: they branch off from its checkpoint at
the stage switch (resume=branch), which is bit for bit what they would be from the start, so that the difference between them is the stable
stage alone. A run that is complete is not run again; one that was killed goes on from its newest checkpoint.

Writes ``ablation.json`` and ``centers.png`` to --results. Accuracy is that of the pairs, per run the mean over the folds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.training import ROOT, free_port
from train.table import format_seconds

TRUNK = "pco"
RECIPES = {"plain": "lfw_tiny_plain", TRUNK: "lfw_tiny", "early": "lfw_tiny_early", "epl": "lfw_tiny_epl", "replace": "lfw_tiny_replace"}
MEANING = {
    "plain": "no stages: all class centers, 16 epochs",
    "early": "early only: half of the class centers, 12 + 4 epochs",
    "pco": "early 12 epochs, then pco 4",
    "epl": "early 12 epochs, then epl 4",
    "replace": "early 12 epochs, then replace 4",
}


@dataclass(frozen=True)
class Outcome:
    """One complete run."""

    variant: str
    seed: int
    accuracy: float  # mean over the folds
    folds_std: float
    training_seconds: float  # without start, saving and evaluation; of a branch, its trunk's early stage included
    commit: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="record shards of the training identities")
    parser.add_argument("--images", type=Path, required=True, help="folder of images to verify with")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs.txt of identities that are not trained on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--deepspeed-config", type=Path, default=ROOT / "ds_configs/zero1_bf16.json")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/ablation", help="one folder a run")
    parser.add_argument("--results", type=Path, default=ROOT / "tests/bench/results")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values for every run")
    arguments = parser.parse_intermixed_args()
    outcomes: list[Outcome] = []
    pending = [(seed, variant) for seed in arguments.seeds for variant in RECIPES]
    begin = time.monotonic()
    for done, (seed, variant) in enumerate(pending):
        folder = arguments.output / f"{variant}_{seed}"
        print(f"{done + 1}/{len(pending)} {variant}, seed {seed} after {format_seconds(time.monotonic() - begin)}", flush=True)
        outcomes.append(run(arguments, folder, variant, seed))
        write_results(arguments, outcomes)
    print(table(outcomes))
    return 0


def run(arguments: argparse.Namespace, folder: Path, variant: str, seed: int) -> Outcome:
    """Train and evaluate one variant, unless that was done already. SystemExit with the run's last words if it fails."""
    summary = folder / "summary.json"
    if not summary.exists():
        branches = variant not in ("plain", TRUNK)
        if branches and not (folder / "checkpoints").exists():
            branch_off(arguments.output / f"{TRUNK}_{seed}" / "checkpoints", folder / "checkpoints")
        recipe = ROOT / f"train/recipes/{RECIPES[variant]}.yaml"
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(arguments.ranks)]
        launcher += ["--master_port", str(free_port()), "--module", "train"]
        configs = ["--config", str(recipe), "--deepspeed_config", str(arguments.deepspeed_config)]
        given = [f"data.path={arguments.data}", f"output={folder}", f"seed={seed}", f"resume={'branch' if branches else 'auto'}"]
        given += [f"eval.images={arguments.images}", f"eval.pairs={arguments.pairs}", "checkpoint.keep_last=1000", "metrics.port=0"]
        command = [*launcher, *configs, *given, *arguments.overrides]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "commit.txt").write_text(commit())
        with (folder / "log.txt").open("a") as log:
            subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}, stdout=log, stderr=subprocess.STDOUT)
        if not summary.exists():  # the launcher's exit code is 0 even where a rank was killed
            sys.exit(f"{folder / 'log.txt'}: the run did not end well:\n{(folder / 'log.txt').read_text()[-2000:]}")
    result = json.loads(summary.read_text())
    pairs = result["pairs"]
    return Outcome(variant, seed, pairs["accuracy"], pairs["std"], result["training_seconds"], (folder / "commit.txt").read_text())


def branch_off(trunk: Path, checkpoints: Path) -> None:
    """Copy the trunk's checkpoint at its stage switch."""
    for checkpoint in sorted(trunk.glob("step_*")):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        stages = manifest["run"]["stages"]
        if stages["index"] == 1 and stages["start"] == manifest["step"]:
            partial = checkpoints.with_name("checkpoints.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(checkpoint, partial / checkpoint.name)
            partial.rename(checkpoints)
            return
    sys.exit(f"{trunk}: no checkpoint of the stage switch; delete {trunk.parent} and start again")


def commit() -> str:
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def table(outcomes: list[Outcome]) -> str:
    """Markdown: of each variant mean, standard deviation and range over seeds, and how long a run trained."""
    rows = ["| variant | accuracy, mean of seeds | standard deviation | lowest to highest | training |", "|---|---|---|---|---|"]
    for variant in MEANING:
        of_variant = [outcome for outcome in outcomes if outcome.variant == variant]
        accuracies = [100 * outcome.accuracy for outcome in of_variant]
        if accuracies:
            spread = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else "one seed"
            minutes = statistics.mean(outcome.training_seconds for outcome in of_variant) / 60
            scope = f"{min(accuracies):.2f} to {max(accuracies):.2f}"
            rows.append(f"| {MEANING[variant]} | {statistics.mean(accuracies):.2f} % | {spread} | {scope} | {minutes:.1f} min |")
    return "\n".join(rows)


def write_results(arguments: argparse.Namespace, outcomes: list[Outcome]) -> None:
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "ablation.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    draw(arguments, outcomes)


def windows(arguments: argparse.Namespace, variant: str, seed: int) -> list[dict]:
    """The log windows of a run, of a branch with the last one of its trunk before; of a step that was taken twice the last."""
    own = _windows(arguments.output / f"{variant}_{seed}" / "metrics.jsonl")
    if variant in ("plain", TRUNK):
        return own
    trunk = _windows(arguments.output / f"{TRUNK}_{seed}" / "metrics.jsonl")
    return [*[line for line in trunk if line["step"] < own[0]["step"]][-1:], *own]


def _windows(path: Path) -> list[dict]:
    lines = {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}
    return [lines[step] for step in sorted(lines)]


def draw(arguments: argparse.Namespace, outcomes: list[Outcome]) -> None:
    """How far class centers and expectations lie apart over training; a thin line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "center_expectation_cosine": "cosine of class center w and expectation e\n(mean over the classes)",
        "target_cosine": "cosine of embedding and own center\n(w; e alone under replace)",
        "expectation_drift": "1 - cosine of e before and after a step\n(mean over the classes of the batch)",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.5), constrained_layout=True)
    colors = dict(zip(MEANING, ("tab:gray", "tab:blue", "tab:red", "tab:green", "tab:orange"), strict=True))
    labelled: set[str] = set()
    for outcome in outcomes:
        lines = windows(arguments, outcome.variant, outcome.seed)
        for axis, field in zip(axes, panels, strict=True):
            points = [(line["epoch"], line[field]) for line in lines if line[field] is not None]
            label = None if outcome.variant in labelled else outcome.variant
            axis.plot(*(zip(*points, strict=True) if points else ((), ())), color=colors[outcome.variant], lw=1, label=label)
        labelled.add(outcome.variant)
    for axis, (field, text) in zip(axes, panels.items(), strict=True):
        axis.axvline(12, color="black", lw=0.8, ls=":")
        axis.set(title=text, xlabel="epoch (stable stage from 12 on)")
        axis.grid(alpha=0.3)
        if field == "expectation_drift" and any(outcome.variant != "plain" for outcome in outcomes):  # plain has no expectations
            axis.set_yscale("log")
    axes[1].legend(loc="lower right")
    seeds = ", ".join(map(str, sorted({outcome.seed for outcome in outcomes})))
    figure.suptitle(f"lfw_tiny and its variants, seeds {seeds}; a line a seed, the stable stages branch off from pco's early one")
    figure.savefig(arguments.results / "centers.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
