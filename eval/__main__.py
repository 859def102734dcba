"""``python -m eval COMMAND``: embeddings to numbers, from the command line. Each command is a module of ``eval.commands``."""

import argparse
import importlib
import sys
from datetime import timedelta

from data_pipeline.errors import DataError
from eval.commands import COMMANDS
from eval.embedder import INPUT_RANGES
from eval.errors import EvalError
from train.dist import RankError, process_group, read_ranks

# The others wait while the first rank scores, for hours where pairs are many; of a dead rank the launcher knows.
_PATIENCE = timedelta(days=7)


def main(argv: list[str]) -> int:
    """Run one command. Returns the exit code: 0, 2 after ``error: ...`` on stderr, 130 when interrupted."""
    args = _parser().parse_args(_join_input_range([word for word in argv if not word.startswith("--local_rank=")]))  # the launcher's
    args.ranks = read_ranks()
    try:
        if args.ranks.world_size > 1:
            _run_on_ranks(args)
        else:
            args.run(args)
    except (EvalError, DataError, RankError, OSError) as error:
        if args.ranks.is_first or not isinstance(error, RankError):  # which is raised alike on every rank
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.ranks.is_first:
            print("\ninterrupted; no file is half written", file=sys.stderr)
        return 130
    return 0


def _run_on_ranks(args: argparse.Namespace) -> None:
    if not args.on_ranks:
        raise RankError(f"{args.command} is work for one process; start it without a launcher")
    with process_group(args.ranks, _PATIENCE) as args.ranks:
        problem = None
        try:
            args.run(args)
        except BrokenPipeError:  # nobody reads on, which may be noticed anywhere: this rank leaves, and the launcher ends the others
            raise
        # Of all ranks alike, or of the first, which does what follows the last gather alone.
        except (EvalError, DataError, RankError, OSError) as error:
            problem = str(error)
        problems = [text for text in args.ranks.gather(problem) if text is not None]
    if problems:  # only now: ranks that do not leave the group in order abort
        raise RankError(problems[0])


def _join_input_range(argv: list[str]) -> list[str]:
    """Turn ``--input-range -1..1`` into ``--input-range=-1..1``: argparse would read the value as an option."""
    joined: list[str] = []
    for word in argv:
        if word in INPUT_RANGES and joined[-1:] == ["--input-range"]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval", description="Turn a face model's embeddings into published numbers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"eval.commands.{name}")
        command = commands.add_parser(name, help=summary, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=name, on_ranks=getattr(module, "ON_RANKS", False))
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
