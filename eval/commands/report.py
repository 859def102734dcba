"""``python -m eval report``."""

import argparse
import re
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.output import new_folder
from eval.commands.shared import Progress
from eval.errors import EvalError
from eval.results import read_results

DESCRIPTION = (
    "Compare models by the results that pairs, ijb and mfr wrote with --json: one page with a table of all numbers and their confidence "
    "intervals, ROC and DET curves of all models, and each one's histograms of scores. Results stand in one table and in one picture only "
    "if they are of one protocol, one data set and as many pairs. DIR gets index.html, which needs no other file and no network, and the "
    "pictures as PNG; it appears when it is complete, or not at all."
)
_OWNED = re.compile(r"index\.html|\d+-(pairs|ijb|mfr)-(roc|det|histogram(-\d+)?)\.png")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help="what pairs, ijb and mfr wrote with --json")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    command.add_argument("--force", action="store_true", help="replace DIR, if an earlier report is all that it holds")


def run(args: argparse.Namespace) -> None:
    from eval.report import write_report  # here, because matplotlib takes a second to import

    entries = read_results(args.results)
    try:
        with new_folder(args.out, _OWNED, force=args.force) as folder:
            page = write_report(entries, folder, Progress("pictures"))
    except DataError as error:
        raise EvalError(str(error)) from error
    print(args.out / page.name)
