"""Entry: ``deepspeed --module train ...`` or ``torchrun -m train ...``, from the repository root."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import model
from train.redact import redact

_UNEXPECTED, _ERROR, _INTERRUPTED = 1, 2, 130
_COMMANDS = {
    "doctor": "train.doctor",
    "plan": "train.plan",
    "report": "train.report_page",
    "reshard": "train.reshard",
    "tune": "train.tune",
}
_DESCRIPTION = """\
Train a face-recognition backbone through the stages of a recipe.

  deepspeed --num_gpus 2 --module train --config train/recipes/demo.yaml --deepspeed_config ds_configs/zero1_bf16.json \\
      data.path=SHARDS output=RUN [key=value ...]

key=value overrides the recipe, with dots for sections: optimizer.lr=5e-4 stages.0.epochs=2. The run lies in `output`: recipe.yaml,
metrics.jsonl, summary.json, report.html, checkpoints/. Started again, it goes on from its newest complete checkpoint (resume=auto).

  python -m train plan --config R.yaml --deepspeed_config J.json --world-size 8

says beforehand what a recipe comes to on a number of ranks, in steps, memory and time, see python -m train plan --help.

  python -m train doctor

checks a machine before it trains, and under a launcher its ranks together, see python -m train doctor --help.

  python -m train reshard RUN NEW_RUN --world-size 32

rewrites a checkpoint as another number of ranks would have saved it. A run reads those of any number of ranks without it.

  python -m train tune --config R.yaml --deepspeed_config J.json --ranks 8

measures which micro-batch, ZeRO stage, precision, activation checkpointing and overlap_comm are fastest here, see its --help.

  python -m train report RUN

writes report.html, one page with the curves of a run, complete or not.

SIGTERM or SIGUSR1 to the launcher or to any rank, or the end of the launcher, is a request to stop: while it trains, the run saves a
checkpoint at the next step and ends; else it ends at once.

Exit codes of a rank: 0 the run is complete, 1 an unexpected error, 2 something given is wrong (one line says what), 3 a rank stood still
for longer than the recipe's `watchdog` allows (one line says which and where), 75 stopped on request: start it again to go on, 130
interrupted. The launcher's own exit code may be 0 where ranks were killed: `output`/summary.json is there if the run is complete, and only
then."""


def main() -> None:
    """Parse, check everything that needs no other rank, train, evaluate."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]  # which the launcher puts first
    if words and words[0] in _COMMANDS:
        _check_import_path()
        sys.exit(importlib.import_module(_COMMANDS[words[0]]).main(words[1:]))
    arguments = _parse_arguments()
    _check_import_path()
    # Heavy imports come after the cheap refusals.
    from data_pipeline.errors import DataError
    from eval.errors import EvalError
    from train.autotuning import read_ds_config, with_batch_of
    from train.config import load_run_config
    from train.dist import RankError, import_deepspeed, lost_connection, process_group, read_ranks
    from train.ds_config import complete_ds_config
    from train.stop import STOPPED, Stopped, StopRequests
    from train.watchdog import Watchdog

    stop = StopRequests()
    stop.listen()
    ranks = read_ranks()
    try:
        cfg = load_run_config(arguments.config, arguments.overrides)
        import_deepspeed(ranks.device)
        document, experiment = read_ds_config(arguments.deepspeed_config)
        if experiment:
            document, cfg = with_batch_of(document, cfg)
        ds_config, summary = complete_ds_config(document, cfg, ranks.world_size, ranks.device.type)
    except ValueError as error:  # every rank of a node sees the same; one of them says it
        _stop(str(error) if ranks.local_rank == 0 else None)
    watchdog = Watchdog(cfg.watchdog, ranks, cfg.output / "stacks")
    try:
        with watchdog, process_group(ranks, cfg.watchdog.group_timeout) as ranks:
            watchdog.connect(ranks)
            _train(cfg, ds_config, summary, ranks, stop, watchdog)
    except Stopped as stopped:
        ranks.say(str(stopped))
        os._exit(STOPPED)
    except RankError as error:
        _stop(str(error) if ranks.is_first else None)
    except (DataError, EvalError) as error:  # on this rank alone: the others wait for it until the launcher stops them
        _stop(f"rank {ranks.rank}: {error}")
    except KeyboardInterrupt:
        print(
            f"rank {ranks.rank}: interrupted; the newest checkpoint is complete, start again to go on from it", file=sys.stderr, flush=True
        )
        os._exit(_INTERRUPTED)
    except Exception as error:
        reason = lost_connection(error)
        text = f"error: rank {ranks.rank}: {watchdog.loss(reason)}" if reason else f"rank {ranks.rank}:\n{traceback.format_exc()}"
        sys.stderr.write(redact(f"{text.rstrip()}\n"))
        sys.stderr.flush()
        os._exit(_UNEXPECTED)


def _train(cfg, ds_config, summary, ranks, stop, watchdog) -> None:
    from train.build import build_run
    from train.evaluation import evaluate
    from train.loop import train
    from train.report import write_summary
    from train.stop import Stopped

    run = build_run(cfg, ds_config, summary, ranks, stop, watchdog)
    try:
        with stop.held(cfg.checkpoint.grace_s):
            train(run)
    except Stopped:
        run.close()
        raise
    except SystemExit:  # of DeepSpeed's engine, which has measured what its autotuner asked for, on every rank
        run.close()
        return
    run.progress.close()
    watchdog.enter("end", run.step)
    reports = evaluate(run)
    ranks.together(lambda: write_summary(run, *reports) if ranks.is_first else None)
    if ranks.is_first:
        _report(cfg.output, ranks.say)
    run.close()


def _report(output: Path, say: Callable[[str], None]) -> None:
    """A run that has trained is complete, whatever becomes of its report."""
    try:
        from train.report_page import write_report

        say(f"report in {write_report(output)}")
    except Exception as error:
        say(f"warning: no report was written ({type(error).__name__}: {error}); python -m train report {output} tries again")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("train", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML), see train/recipes/")
    parser.add_argument(
        "--deepspeed_config", required=True, help="DeepSpeed's JSON, see ds_configs/README.md; its autotuner gives the content in base64"
    )
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; LOCAL_RANK in the environment is what counts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, e.g. data.path=SHARDS")
    return parser.parse_args()


def _check_import_path() -> None:
    """`model` and `train` are names that an installed package may claim; theirs would win over ours without a word."""
    ours, found = Path(__file__).resolve().parents[1] / "model", Path(model.__file__).resolve().parent
    if found != ours:
        _stop(f"`import model` finds {found}, expected {ours}: start from the repository root, with --module or -m")


def _stop(message: str | None) -> None:
    if message is None:
        time.sleep(5)  # the launcher kills every rank at the first exit: let the one that has the message go first
    else:
        sys.stderr.write(redact(f"error: {message}\n"))  # in one piece: ranks share the stream
    sys.stderr.flush()
    os._exit(_ERROR)  # not sys.exit: other ranks may be waiting in a collective that teardown would wait for


if __name__ == "__main__":
    main()
