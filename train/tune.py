"""``python -m train tune``: a measured sweep over what decides speed and memory, on the machine at hand.

Every trial is a short run of the recipe in fresh processes, so one that runs out of memory or hangs costs itself alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

from data_pipeline.pack import pack
from data_pipeline.shard_set import open_set
from data_pipeline.synthetic import write_synthetic
from train.dist import import_deepspeed, read_ranks
from train.document import read_recipe
from train.lock import OutputLock
from train.redact import redact
from train.stop import STOPPED
from train.table import format_seconds
from train.tune_process import FAILED, OUT_OF_MEMORY, REFUSED, SKIPPED, Outcome, run_trial
from train.tune_report import BEST_CONFIG, BEST_TEXT, counts, measured_text, table, write_best
from train.tune_results import Results
from train.tune_settings import ON_OFF, PRECISIONS, Settings, Workload, open_workload

_NOTHING_MEASURED, _ERROR, _INTERRUPTED = 1, 2, 130
_IMAGES_PER_IDENTITY, _MIN_IDENTITIES = 24, 64  # of the synthetic faces
_CONTENDERS = 3  # at most, that are measured again

T = TypeVar("T")


class Sweep:
    """Trials in their order, each told of as it comes and kept in ``results``."""

    def __init__(self, workload: Workload, results: Results, folder: Path, timeout_s: float, say: Callable[[str], None] = print) -> None:
        """``timeout_s``: of one trial."""
        self._workload, self._results, self._folder, self._timeout_s, self._say = workload, results, folder, timeout_s, say
        self._done = self._total = 0

    def run(self, space: Sequence[Settings], repeats: int) -> None:
        """Measure what ``results`` lack of ``space``; then the best again, ``repeats`` times in turn.

        The windows of one process differ less than those of two, so what is close at the top is measured in several.
        A trial that failed is tried again, unless memory or time was the reason.
        """
        missing = [settings for settings in space if self._lacks(settings, 0)]
        refused = {settings: reason for settings in missing if (reason := self._workload.refusal(settings))}
        for settings, reason in refused.items():
            self._results.add(settings, 0, Outcome(REFUSED, reason))
        missing = [settings for settings in missing if settings not in refused]
        kept = len(space) - len(missing) - len(refused)
        self._say(
            f"{len(space)} settings: {len(missing)} to measure, {len(refused)} refused"
            + (f", {kept} known from before" if kept else "")
            + (f"; then the best again ({repeats} x)" if repeats else "")
        )
        self._total = len(missing) + repeats * min(_CONTENDERS - 1, len(space) - len(refused))
        for settings in missing:
            self._measure(settings, 0)
        contenders = self._contenders()
        again = [(settings, repeat) for repeat in range(1, repeats + 1) for settings in contenders if self._lacks(settings, repeat)]
        self._total = self._done + len(again)
        for settings, repeat in again:
            self._measure(settings, repeat)

    def _lacks(self, settings: Settings, repeat: int) -> bool:
        return (settings, repeat) not in self._results.rows or self._results.rows[settings, repeat].status == FAILED

    def _contenders(self) -> list[Settings]:
        """The best two, and a third that is within noise of the best."""
        ranking = self._results.ranking(repeats=False)
        return [entry.settings for index, entry in enumerate(ranking[:_CONTENDERS]) if index < 2 or entry.within_noise_of(ranking[0])]

    def _measure(self, settings: Settings, repeat: int) -> None:
        again = f", repeat {repeat}" if repeat else ""
        self._say(f"[{self._done + 1}/{self._total}] {settings}{again}; ETA {self._eta()}")
        smaller = self._smaller_without_memory(settings)
        if smaller:
            outcome = Outcome(SKIPPED, f"a micro-batch of {smaller.micro_batch_size} is out of memory already")
        else:
            folder = self._folder / "trials" / f"{_file_name(settings)}_{repeat}"
            outcome = run_trial(self._workload, settings, folder, self._timeout_s)
        self._results.add(settings, repeat, outcome)
        self._done += 1
        self._say(f"    {measured_text(outcome)}")

    def _smaller_without_memory(self, settings: Settings) -> Settings | None:
        """The same settings with a smaller micro-batch, if that was out of memory."""
        for (other, _), outcome in self._results.rows.items():
            same = replace(other, micro_batch_size=settings.micro_batch_size) == settings
            if same and other.micro_batch_size < settings.micro_batch_size and outcome.status == OUT_OF_MEMORY:
                return other
        return None

    def _eta(self) -> str:
        taken = [outcome.seconds for outcome in self._results.rows.values() if outcome.seconds]
        return format_seconds((self._total - self._done) * sum(taken) / len(taken)) if taken else "after the first"


def _file_name(settings: Settings) -> str:
    checkpointing, overlap = ON_OFF[settings.checkpointing], ON_OFF[settings.overlap]
    return (
        f"micro{settings.micro_batch_size}_zero{settings.zero_stage}_{settings.precision}_checkpointing-{checkpointing}_overlap-{overlap}"
    )


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 no trial could be measured, 2 something given is wrong, 75 stopped by SIGTERM, 130 by Ctrl-C."""
    arguments = _parser().parse_intermixed_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # an exception, so that `finally` ends the trial
    try:
        lock = OutputLock(arguments.output, _say)
        try:
            return _tune(arguments)
        finally:
            lock.close()
    except (ValueError, OSError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return _ERROR
    except KeyboardInterrupt:
        print("stopped before the first trial", file=sys.stderr)
        return _INTERRUPTED


def _tune(arguments: argparse.Namespace) -> int:
    folder, this = arguments.output, read_ranks()
    import_deepspeed(this.device)
    world_size = arguments.ranks or (torch.cuda.device_count() if this.device.type == "cuda" else 1)
    synthetic = arguments.synthetic or not _names_data(arguments.config, arguments.overrides)
    faces = [f"data.path={folder / 'synthetic' / 'shards'}", "data.num_images=null", "data.num_classes=null"] if synthetic else []
    workload = open_workload(
        arguments.config, (*arguments.overrides, f"output={folder}", *faces), arguments.deepspeed_config, arguments.stage, world_size,
        this.device.type, arguments.window_steps, arguments.windows,
    )  # fmt: skip
    if synthetic:
        _draw_faces(folder / "synthetic", workload.global_batch_size)
    open_set(workload.cfg.data.path)
    results = Results(folder, _common(workload))
    stage = workload.cfg.stages[workload.stage].name
    _say(f"stage {stage} of {arguments.config}, {world_size} ranks ({this.device.type}), global batch {workload.global_batch_size:,}")
    try:
        Sweep(workload, results, folder, arguments.timeout, _say).run(_space(arguments, workload), arguments.repeats)
    except (KeyboardInterrupt, SystemExit) as end:
        _say(f"\n{table(workload, results)}")
        print(f"stopped: {results.path} has {counts(results)}; the same command goes on from there", file=sys.stderr)
        return STOPPED if isinstance(end, SystemExit) else _INTERRUPTED
    _say(f"\n{table(workload, results)}\n")
    if not results.ranking():
        print(f"error: no trial could be measured; {results.path} says why", file=sys.stderr)
        return _NOTHING_MEASURED
    _say(write_best(workload, results, folder, arguments.overrides))
    if synthetic:
        _say("\nnote: measured on synthetic faces; with the classes of real data the head takes more time and memory")
    _say(f"\nwritten: {results.path}, {folder / BEST_CONFIG}, {folder / BEST_TEXT}")
    return 0


def _say(text: str) -> None:
    print(redact(text), flush=True)


def _names_data(recipe: Path, overrides: Sequence[str]) -> bool:
    """Whether recipe or command line have a ``data.path``. Raises ConfigError."""
    document = read_recipe(recipe)
    for override in overrides:
        document.override(override)
    return bool((document.data.get("data") or {}).get("path"))


def _draw_faces(folder: Path, images: int) -> None:
    """Pack at least so many synthetic faces in ``folder / "shards"``, if they are not there yet."""
    if (folder / "shards").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    identities = max(_MIN_IDENTITIES, math.ceil(images / _IMAGES_PER_IDENTITY))
    _say(f"drawing {identities * _IMAGES_PER_IDENTITY:,} synthetic faces of {identities:,} identities")
    write_synthetic(folder / "faces", identities, _IMAGES_PER_IDENTITY, seed=0, progress=True)
    pack([folder / "faces"], folder / "shards", 2)


def _common(workload: Workload) -> dict[str, object]:
    """What all trials of a sweep have in common, for the next one that finds its results."""
    cfg = workload.cfg
    common = {
        "recipe": cfg.mathematics(),
        "data.path": str(cfg.data.path),
        "data.num_threads": cfg.data.num_threads,
        "DeepSpeed JSON": workload.deepspeed.data,
        "stage": cfg.stages[workload.stage].name,
        "number of ranks": workload.world_size,
        "device type": workload.device_type,
        "window length": workload.window_steps,
        "number of windows": workload.windows,
        "torch version": version("torch"),
        "DeepSpeed version": version("deepspeed"),
    }
    return redact(common)


def _space(arguments: argparse.Namespace, workload: Workload) -> list[Settings]:
    """All combinations; micro-batches ascend, so that one that is out of memory spares the larger ones."""
    size = workload.cfg.stage_batch(workload.stage).micro_batch_size
    sizes = arguments.micro_batch or [size // 2, size, 2 * size]
    precisions = arguments.precision or [workload.given.precision]
    axes = (precisions, arguments.zero, arguments.checkpointing, arguments.overlap, sorted(sizes))
    combinations = itertools.product(*axes)
    return [Settings(micro, stage, precision, checkpointing, overlap) for precision, stage, checkpointing, overlap, micro in combinations]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "train tune",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Measure what is fastest on this machine: every combination of micro-batch, ZeRO stage, precision, activation checkpointing and
overlap_comm is trained for a few steps in processes of its own. The global batch stays that of the recipe: another micro-batch
accumulates more or less, and one that does not divide it is refused. A trial that runs out of memory or hangs is ended and noted.

  python -m train tune --config train/recipes/demo.yaml --deepspeed_config ds_configs/zero1_bf16.json --ranks 2 \\
      --output runs/tune --micro-batch 32,64 --zero 1,2

Trains on the recipe's records, or on synthetic faces where it names none. Then the best two are measured again, and a third that is
within noise of the best. OUTPUT gets results.csv, best_ds_config.json, best.txt (why, and the command to start) and the logs of all trials.
The same command goes on from results.csv after Ctrl-C or a kill.""",
        epilog="""\
Memory is the peak of the rank with the most: on a GPU what torch had allocated, on a CPU what was resident. It includes saving a
checkpoint at the end, as in any run. Settings whose windows overlap those of the fastest are within noise of it.

Exit codes: 0 done, 1 no trial could be measured, 2 something given is wrong, 75 stopped by SIGTERM, 130 by Ctrl-C.""",
    )
    switch = _list_of(lambda text: {word: value for value, word in ON_OFF.items()}[text], "on or off")
    number = _list_of(_positive, "a positive number")
    precision = _list_of(lambda text: PRECISIONS[PRECISIONS.index(text)], f"one of {', '.join(PRECISIONS)}")
    stage = _list_of(lambda text: range(4)[int(text)], "a ZeRO stage, 0 to 3")
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML), see train/recipes/")
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="DeepSpeed's JSON; all that the settings do not change stays")
    parser.add_argument("--output", type=Path, default=Path("runs/tune"), help="folder of the results (default: runs/tune)")
    parser.add_argument("--ranks", type=_positive, metavar="N", help="default: all GPUs; 1 without a GPU")
    parser.add_argument("--stage", metavar="NAME", help="stage of the recipe to measure (default: the last)")
    parser.add_argument("--synthetic", action="store_true", help="train on synthetic faces even if the recipe names records")
    parser.add_argument("--micro-batch", type=number, metavar="LIST", help="default: half of the recipe's, the recipe's, twice that")
    parser.add_argument("--zero", type=stage, default=[1, 2, 3], metavar="LIST", help="default: 1,2,3")
    parser.add_argument("--precision", type=precision, metavar="LIST", help=f"of {', '.join(PRECISIONS)} (default: the JSON's)")
    parser.add_argument("--checkpointing", type=switch, default=[False, True], metavar="LIST", help="default: off,on")
    parser.add_argument("--overlap", type=switch, default=[True, False], metavar="LIST", help="default: on,off")
    parser.add_argument("--windows", type=_positive, default=3, metavar="N", help="windows of a trial that count (default: 3)")
    parser.add_argument("--window-steps", type=_positive, default=4, metavar="N", help="optimizer steps of a window (default: 4)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="how often the best are measured again (default: 1)")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS", help="a trial that takes longer is ended (default: 900)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, e.g. data.path=SHARDS")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _list_of(parse: Callable[[str], T], expected: str) -> Callable[[str], list[T]]:
    """Of an axis: values between commas, each once."""

    def values(text: str) -> list[T]:
        try:
            return list(dict.fromkeys(parse(item.strip()) for item in text.split(",")))
        except (ValueError, KeyError, IndexError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f"must be values between commas, each {expected}, got {text!r}") from None

    return values
