"""``python -m eval pairs``."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from data_pipeline.output import replace_file
from eval.bootstrap import CONFIDENCE, Interval
from eval.commands.shared import (
    about_model,
    add_embedding,
    add_model,
    add_pairs_folder,
    check_outputs,
    embed_options,
    open_model,
    open_pairs,
)
from eval.errors import EvalError
from eval.pair_pack import SUFFIX
from eval.pair_set import PairSet
from eval.pairs import FAR_TARGETS, PairReport, evaluate_pairs

DESCRIPTION = (
    "Embed every image of the pairs and its mirror, sum and normalise, and score each pair by cosine. Prints accuracy over the folds "
    f"(threshold chosen on the others) and TAR at FAR {', '.join(f'{far:.0e}' for far in FAR_TARGETS)}, as far as the pairs resolve them."
)

ON_RANKS = True


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_embedding(command)
    add_pairs_folder(command)
    command.add_argument("--pack", type=Path, metavar="FILE", help=f"instead of both: NAME{SUFFIX}, or the field's NAME.bin")
    command.add_argument("--json", type=Path, help="also write every number, per fold too, to this file")
    command.add_argument("--plots", type=Path, metavar="DIR", help="also draw roc.png, det.png and histogram.png there")


def run(args: argparse.Namespace) -> None:
    check_outputs(args)
    pairs = args.ranks.together(lambda: _open(args))
    for remark in pairs.remarks():
        args.ranks.say(f"warning: {remark}")
    embedder = open_model(args)
    options = embed_options(args)
    report = evaluate_pairs(embedder, pairs, **options)
    if report is None:
        return
    cached = options["cache"] is not None and options["cache"].hit
    _print(report, cached)
    if args.json:
        record = {
            "protocol": "pairs",
            **about_model(embedder),
            "source": pairs.origin,
            **({"pack": str(args.pack)} if args.pack else {"images": str(args.images), "pairs": str(args.pairs)}),
            **asdict(report),
            "images_per_second": None if cached else report.images_per_second,
        }
        replace_file(args.json, json.dumps(record, indent=2) + "\n")
    if args.plots:
        _draw(report, args.plots)


def _open(args: argparse.Namespace) -> PairSet:
    """The pairs; if their curves shall be drawn, only those that have some."""
    pairs = open_pairs(args.images, args.pairs, args.pack, "--pack FILE")
    if args.plots and len(set(pairs.same.tolist())) < 2:
        raise EvalError(f"{pairs.source}: its pairs are all of one kind, genuine or impostor: there are no curves for --plots")
    return pairs


def _draw(report: PairReport, folder: Path) -> None:
    from eval.plots import ModelScores, plots  # here, because matplotlib takes a second to import

    points = zip(report.tar_at_far, report.intervals.tar_at_far, strict=True)
    bars = [(point.far_target, interval.low, interval.high) for point, interval in points if interval]
    folder.mkdir(exist_ok=True)
    for plot in plots([ModelScores("", report.curves, bars)]):
        replace_file(folder / f"{plot.name}.png", plot.png())


def _print(report: PairReport, cached: bool) -> None:
    intervals = report.intervals
    print(f"{report.num_pairs} pairs of {report.num_images} images, embeddings of {report.embedding_size}")
    for name, accuracy, interval in (
        ("accuracy", report.accuracy, intervals.accuracy),
        ("accuracy with exact thresholds", report.accuracy_exact, intervals.accuracy_exact),
    ):
        spread = f"std {100 * accuracy.std:.2f} over {len(accuracy.accuracies)} folds"
        print(f"{name} {100 * accuracy.mean:.2f} % ({spread}, {_text(interval)})")
    for point, interval in zip(report.tar_at_far, intervals.tar_at_far, strict=True):
        reached = f"FAR {point.far:.2e} at cosine >= {point.threshold:.4f}"
        print(f"TAR@FAR={point.far_target:.0e} {100 * point.tar:.2f} % ({_text(interval)}, {reached})")
    for far in report.unresolved_far:
        print(f"TAR@FAR={far:.0e} not resolved: needs {1 / far:.0f} impostor pairs")
    inferred = ", inferred from the genuine pairs" if intervals.identities_inferred else ""
    print(f"intervals: bootstrap of the {intervals.identities} identities{inferred}, {intervals.replicates} times")
    speed = "embeddings from the cache" if cached else f"{report.images_per_second:.1f} images/s (each with its mirror)"
    print(f"{speed}, {report.seconds:.1f} s")


def _text(interval: Interval | None) -> str:
    """``no interval``: no error was seen, or identities are too few."""
    return f"{100 * CONFIDENCE:.0f} % interval {100 * interval.low:.2f} to {100 * interval.high:.2f}" if interval else "no interval"
