"""``python -m eval table``."""

import argparse
from pathlib import Path

from eval.paper_table import paper_table
from eval.results import read_results

DESCRIPTION = (
    "Print the published figures of LVFace on MFR-Ongoing and IJB-C, and below them your models' in the same columns, from what ijb and mfr"
    " wrote with --json: rows for each model (results of equal SHA-256 are one), strict and nearest for IJB-C. A dash: no value."
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("results", nargs="*", type=Path, metavar="RESULT.json", help="what ijb and mfr wrote with --json")
    command.add_argument("--markdown", action="store_true", help="as a Markdown table")


def run(args: argparse.Namespace) -> None:
    print(paper_table(read_results(args.results), markdown=args.markdown))
