"""``python -m eval mfr run`` and ``python -m eval mfr check-package``."""

import argparse
import json
import textwrap
from pathlib import Path

import torch

from data_pipeline.output import replace_file
from eval import mfr, mfr_folder, mfr_package
from eval.commands.shared import Progress, about_model, add_embedding, add_model, check_outputs, embed_options, open_model
from eval.errors import EvalError
from eval.mfr_state import ScoringState
from train.table import format_seconds

DESCRIPTION = (
    "MFR-Ongoing, whose server is offline and whose images were never public: run its protocol on your own sets, or check whether a "
    "package keeps its rules."
)
_RUN = (
    "Embed every image once, without its mirror, and score by cosine all pairs of a set: TAR at a FAR of 1e-4 (mask, children) or 1e-6 "
    "(each race, and mr_all: the four races together), with exact thresholds however many the pairs are. Sets that are absent are named "
    "and are null in the JSON."
)
_CHECK = (
    "Hold a package to every published rule, and say of each what was expected and what was found. Exit code 0: it keeps them all. "
    "Not judged: 15 ms an image on the server's V100, and that the channels are in RGB order, which no graph tells."
)

ON_RANKS = True


def add_arguments(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(required=True, metavar="ACTION", dest="action")
    run = actions.add_parser(
        "run",
        help="TAR@FAR on your own sets",
        description=f"{textwrap.fill(_RUN, 120)}\n\n{mfr_folder.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(run)
    add_embedding(run)
    run.add_argument("--data", required=True, type=Path, metavar="DIR", help="the sets, laid out as above")
    run.add_argument("--device", choices=("cpu", "cuda"), help="what multiplies embeddings, in full float32; default: a GPU if any")
    run.add_argument(
        "--state", type=Path, metavar="DIR", help="keep progress of the scoring there: the same command goes on from it after a stop"
    )
    run.add_argument("--estimate", action="store_true", help="measure for some seconds, say how long all would take, and end")
    run.add_argument("--json", type=Path, help="also write every number to this file")
    check = actions.add_parser("check-package", help="whether a model may be submitted", description=_CHECK)
    check.add_argument("package", type=Path, metavar="PACKAGE.zip|MODEL.onnx", help="what would be submitted, or the model for it")


def run(args: argparse.Namespace) -> None:
    if args.action == "run":
        _run(args)
    else:
        args.ranks.together(lambda: _check_package(args.package) if args.ranks.is_first else None)


def _run(args: argparse.Namespace) -> None:
    check_outputs(args)
    device = args.ranks.together(lambda: _device(args))
    folder = args.ranks.together(lambda: mfr_folder.read_folder(args.data))
    parts = args.ranks.together(lambda: mfr.parts_of(folder))
    embedder = open_model(args)
    if args.estimate:
        found = mfr.estimate(embedder, parts, ranks=args.ranks.world_size, device=device, decoder=args.decoder)
        if args.ranks.is_first:
            _print_estimate(found)
        return
    embedded = [mfr.embed_part(embedder, part, **embed_options(args)) for part in parts]
    if not args.ranks.is_first:
        return  # the first rank scores alone
    if args.state:
        args.state.mkdir(exist_ok=True)
    results, states = {}, []
    for part, embeddings in zip(parts, embedded, strict=True):
        state = ScoringState(args.state / f"{part.name}.safetensors") if args.state else None
        states.append(state)
        found = mfr.score_part(part, embeddings, device=device, state=state, progress=Progress("pairs"))
        for name, result in found.items():
            _print(name, result)
        results |= found
    for name in mfr.FAR:
        if name not in results:
            print(f"{name:<12} absent: {mfr.why_absent(name, folder)}")
    score = mfr.score(results)
    if score is not None:
        print(f"0.25 mask + 0.75 mr_all {100 * score:.3f} %")
    if args.json:
        record = {
            "protocol": "mfr",
            **about_model(embedder),
            "data": str(args.data),
            "device": device.type,
            **mfr.as_record(results),
        }
        replace_file(args.json, json.dumps(record, indent=2) + "\n")
    for state in filter(None, states):
        state.discard()


def _print(name: str, result: mfr.SetResult) -> None:
    point = result.tar_at_far
    print(
        f"{name:<12} TAR@FAR={point.far_target:.0e} {100 * point.tar:.3f} % (FAR {point.far:.3e} at cosine >= {point.threshold:.6f}), "
        f"{result.images} images of {result.identities}, {point.genuine} genuine and {point.impostor} impostor pairs",
        flush=True,
    )


def _device(args: argparse.Namespace) -> torch.device:
    device = torch.device(args.device or args.ranks.device.type)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EvalError("--device cuda: there is no GPU that torch can use here; leave it out, or give cpu")
    return device


def _print_estimate(found: mfr.Estimate) -> None:
    pairs_per_second = found.pairs / found.scoring_seconds
    print(f"{found.images:,} images at {found.images_per_second:,.1f}/s measured: {format_seconds(found.embedding_seconds)}")
    print(f"{found.pairs:,} pairs at {pairs_per_second:,.0f}/s measured: {format_seconds(found.scoring_seconds)}")
    print(f"in all {format_seconds(found.embedding_seconds + found.scoring_seconds)}")


def _check_package(path: Path) -> None:
    results = mfr_package.check_package(path)
    for result in results:
        print(f"{'ok' if result.ok else 'failed':<7} {result.rule:<15} expected {result.expected}; found {result.found}")
    broken = [result.rule for result in results if not result.ok]
    if broken:
        raise EvalError(f"{path}: keeps {len(results) - len(broken)} of {len(results)} rules, not {', '.join(broken)}")
    print(f"{path}: keeps all {len(results)} rules")
