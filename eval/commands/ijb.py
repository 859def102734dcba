"""``python -m eval ijb``."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from data_pipeline.output import replace_file
from eval.commands.shared import Progress, about_model, add_embedding, add_model, check_outputs, embed_options, open_model
from eval.embed import embed
from eval.ijb import IjbReport, evaluate_templates
from eval.ijb_identification import FPIR_TARGETS, RANKS
from eval.ijb_meta import GALLERIES, IjbTemplates, read_search, read_templates
from eval.ijb_pairs import read_pairs
from eval.ijb_templates import DEFAULT_MODE
from eval.ijb_verification import FAR_TARGETS

DESCRIPTION = (
    "IJB-B and IJB-C, laid out as the field releases them. Cuts every face out by its landmarks, embeds it and its mirror, pools templates "
    "and prints, in all modes N/D/F: 1:1, TAR at FAR 1e-06 to 1e-01, strict (the highest TAR whose FAR is at most the target) and nearest "
    "(the TAR where the ROC curve's FAR is nearest to the target: how published figures were read); 1:N, rank-1, -5, -10 and TPIR at FPIR "
    "0.01 and 0.1, the mean of two galleries. N1: embeddings as long as the network made them; N0: L2-normalised. D1: times the detector's "
    f"score; D0: not. F1: image and mirror summed; F0: the image alone. Published figures are {DEFAULT_MODE}."
)

ON_RANKS = True


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument("--data", type=Path, required=True, metavar="ROOT", help="holds meta/ijbc_*.txt and .csv, and loose_crop/*.jpg")
    command.add_argument("--target", choices=tuple(GALLERIES), default="IJBC", help="which of the two ROOT is (default IJBC)")
    command.add_argument("--protocol", choices=("1:1", "1:N", "both"), default="both", help="default both")
    add_embedding(command, aligned=False)
    command.add_argument("--json", type=Path, help="also write every number, and the curves of 1:1, to this file")


def run(args: argparse.Namespace) -> None:
    check_outputs(args)
    templates = args.ranks.together(lambda: read_templates(args.data, args.target))
    pairs, protocol = args.ranks.together(lambda: _read_protocols(args, templates))
    embedder = open_model(args)
    rows = embed(embedder, templates.images, mirror=True, **embed_options(args))
    report = args.ranks.together(lambda: None if rows is None else evaluate_templates(rows, templates, pairs, protocol, Progress))
    if report is None:
        return
    _print(args, templates, report)
    if args.json:
        record = {
            "protocol": "ijb",
            "target": args.target,
            "compared": args.protocol,
            **about_model(embedder),
            "data": str(args.data),
            "images": len(templates.images),
            "unused_images": templates.unused,
            "templates": len(templates.ids),
            "default_mode": str(DEFAULT_MODE),
            **asdict(report),
        }
        if report.curves is None:
            del record["curves"]
        replace_file(args.json, json.dumps(record, indent=2) + "\n")


def _read_protocols(args: argparse.Namespace, templates: IjbTemplates) -> tuple:
    """Pairs, and galleries with probes; None for what is not asked for, or not this rank's to score."""
    wanted = {"1:1", "1:N"} if args.protocol == "both" else {args.protocol}
    if not args.ranks.is_first:
        wanted = set()
    pairs = read_pairs(args.data, args.target, templates, Progress("bytes of pairs")) if "1:1" in wanted else None
    return pairs, read_search(args.data, args.target, templates) if "1:N" in wanted else None


def _print(args: argparse.Namespace, templates: IjbTemplates, report: IjbReport) -> None:
    unused = f"; {templates.unused} more images are in no template" if templates.unused else ""
    print(f"{args.target}: {len(templates.images)} images in {len(templates.ids)} templates, embeddings of {report.embedding_size}{unused}")
    if report.genuine:
        _print_verification(report)
    if next(iter(report.modes.values())).search:
        _print_search(report)


def _print_verification(report: IjbReport) -> None:
    repeated = f"; {report.repeated} are repeated, and count each time" if report.repeated else ""
    print(f"\n1:1, {report.genuine + report.impostor} pairs: {report.genuine} genuine, {report.impostor} impostor{repeated}")
    for reading, rule in (("strict", "FAR at most"), ("nearest", "FAR nearest to")):
        rows = []
        for mode, found in report.modes.items():
            tars = {point.far: point.tar for point in getattr(found, reading)}
            rows.append((mode, [tars.get(far) for far in FAR_TARGETS]))
        _print_table(f"TAR %, {rule}", [f"{far:.0e}" for far in FAR_TARGETS], rows)
    for far in report.unresolved_far:
        print(f"FAR {far:.0e} not resolved: needs {1 / far:.0f} impostor pairs")


def _print_search(report: IjbReport) -> None:
    first = next(iter(report.modes.values())).search
    counts = (
        f"{each.gallery} of {each.templates} templates, {each.mated} probes with a mate, {each.impostors} without"
        for each in first.galleries
    )
    print(f"\n1:N, galleries {'; '.join(counts)}")
    rows = []
    for mode, found in report.modes.items():
        means = found.search
        rows.append((f"{mode} mean", [*means.mean_ranks.values(), *(means.mean_tpir.get(fpir) for fpir in FPIR_TARGETS)]))
    for each in first.galleries:
        tpir = {point.fpir: point.tpir for point in each.tpir}
        rows.append((f"{DEFAULT_MODE} {each.gallery}", [*each.ranks.values(), *(tpir.get(fpir) for fpir in FPIR_TARGETS)]))
    _print_table("%", [*(f"rank-{k}" for k in RANKS), *(f"TPIR@{fpir:g}" for fpir in FPIR_TARGETS)], rows)
    for each in first.galleries:
        for fpir in each.unresolved_fpir:
            print(f"{each.gallery}: FPIR {fpir:g} not resolved: needs {1 / fpir:.0f} probes without a mate")


def _print_table(title: str, columns: Iterable[str], rows: list[tuple[str, list[float | None]]]) -> None:
    """Shares in percent; a dash for what is not resolved."""
    print(f"{title:22}" + "".join(f"{column:>10}" for column in columns))
    for name, shares in rows:
        print(f"{name:22}" + "".join(f"{'-' if share is None else f'{100 * share:.2f}':>10}" for share in shares))
