"""``python -m eval pairs | pack``: embeddings to numbers, and pairs to one file, from the command line."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from data_pipeline.output import replace_file
from eval.embedder import INPUT_RANGES, load_embedder
from eval.errors import EvalError
from eval.pair_pack import SUFFIX, open_pack, write_pack
from eval.pair_set import PairSet
from eval.pairs import FAR_TARGETS, PairReport, evaluate_pairs
from eval.pairs_file import find_pairs


def main(argv: list[str]) -> int:
    """Run one command. Returns the exit code: 0, 2 after ``error: ...`` on stderr, 130 when interrupted."""
    args = _parser().parse_args(_join_input_range(argv))
    try:
        args.command(args)
    except (EvalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _pairs(args: argparse.Namespace) -> None:
    if args.json:
        _check_output(args.json, "--json")
    pairs = _open_pairs(args.images, args.pairs, args.pack, "--pack FILE")
    embedder = load_embedder(args.model, args.input_range, args.batch_size)
    how = "read from the model" if args.input_range == "auto" else "as told"
    print(f"model {embedder.source}\ninput range {embedder.input_range} ({how}), batch size {embedder.batch_size}", flush=True)
    report = evaluate_pairs(embedder, pairs, progress=_Progress())
    _print_report(report)
    if args.json:
        record = {
            "model": embedder.source,
            "input_range": embedder.input_range,
            "batch_size": embedder.batch_size,
            "source": pairs.origin,
            **({"pack": str(args.pack)} if args.pack else {"images": str(args.images), "pairs": str(args.pairs)}),
            **asdict(report),
            "images_per_second": report.images_per_second,
        }
        replace_file(args.json, json.dumps(record, indent=2) + "\n")


def _pack(args: argparse.Namespace) -> None:
    *sources, out = args.paths
    if len(sources) > 1:
        raise EvalError(f"expected one source and one output, got {len(args.paths)} files: {' '.join(map(str, args.paths))}")
    if not out.name.endswith(SUFFIX):
        raise EvalError(f"{out}: the output comes last, and its name ends in {SUFFIX}")
    _check_output(out, "the output")
    pairs = _open_pairs(args.images, args.pairs, sources[0] if sources else None, "SRC.bin before the output")
    size = write_pack(pairs, out, progress=_Progress())
    print(f"{out}: {len(pairs.pairs)} pairs in {pairs.num_folds} folds, {len(pairs.names)} images, {size} bytes")


def _open_pairs(images: Path | None, pairs_file: Path | None, pack: Path | None, pack_option: str) -> PairSet:
    """The pairs of a folder or of a pack, whichever of the two the command line gives."""
    if pack and not images and not pairs_file:
        return open_pack(pack)
    if images and pairs_file and not pack:
        return find_pairs(images, pairs_file)
    raise EvalError(f"give either --images DIR and --pairs PAIRS.txt, or {pack_option}")


def _check_output(path: Path, option: str) -> None:
    """Before the work: can the file be written?"""
    if not path.parent.is_dir():
        raise EvalError(f"{path}: no such folder: {path.parent}")
    if path.is_dir():
        raise EvalError(f"{path}: is a folder; {option} names a file")


def _print_report(report: PairReport) -> None:
    print(f"{report.num_pairs} pairs of {report.num_images} images, embeddings of {report.embedding_size}")
    for name, accuracy in (("accuracy", report.accuracy), ("accuracy with exact thresholds", report.accuracy_exact)):
        print(f"{name} {100 * accuracy.mean:.2f} % (std {100 * accuracy.std:.2f} over {len(accuracy.accuracies)} folds)")
    for point in report.tar_at_far:
        print(f"TAR@FAR={point.far_target:.0e} {100 * point.tar:.2f} % (FAR {point.far:.2e} at cosine >= {point.threshold:.4f})")
    for far in report.unresolved_far:
        print(f"TAR@FAR={far:.0e} not resolved: needs {1 / far:.0f} impostor pairs")
    print(f"{report.images_per_second:.1f} images/s (each with its mirror), {report.seconds:.1f} s")


class _Progress:
    """One line on stderr, rewritten at most once a second on a terminal, and written every 30 s elsewhere: images done, rate, time left."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last < (1 if self._tty else 30):
            return
        self._last = now
        rate = done / max(now - self._start, 1e-9)
        line = f"{done}/{total} images, {rate:.0f}/s, {(total - done) / rate:.0f} s left"
        print(f"\r{line:<60}" if self._tty else line, end="\n" if done == total or not self._tty else "", file=sys.stderr, flush=True)


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
    fars = ", ".join(f"{far:.0e}" for far in FAR_TARGETS)
    pairs = commands.add_parser(
        "pairs",
        help="verification accuracy and TAR@FAR on a list of pairs (LFW, CFP, AgeDB)",
        description="Embed every image of the pairs and its mirror, sum and normalise, and score each pair by cosine. Prints accuracy "
        f"over the folds (threshold chosen on the others) and TAR at FAR {fars}, as far as the pairs resolve them.",
    )
    pairs.add_argument("--model", required=True, type=Path, help="a run directory (its newest checkpoint), a .safetensors or an .onnx file")
    _add_folder(pairs)
    pairs.add_argument("--pack", type=Path, metavar="FILE", help=f"instead of both: NAME{SUFFIX}, or the field's NAME.bin")
    pairs.add_argument(
        "--input-range",
        choices=("auto", *INPUT_RANGES),
        default="auto",
        help="pixel values that the model takes; auto: 0..255 for an ONNX graph that begins with a Sub and a Mul or Div, else -1..1",
    )
    pairs.add_argument("--batch-size", type=int, default=64, help="images per forward (default 64; a fixed-batch graph keeps its own)")
    pairs.add_argument("--json", type=Path, help="also write every number, per fold too, to this file")
    pairs.set_defaults(command=_pairs)

    pack = commands.add_parser(
        "pack",
        usage=f"%(prog)s [-h] (SRC.bin | --images DIR --pairs PAIRS.txt) OUT{SUFFIX}",
        help="a folder of images and its pairs, or the field's .bin, as one safe file",
        description="Put pairs and their images into one safetensors file: pairs --pack gives the same numbers from it. From SRC.bin, a "
        "pickle, nothing is executed: one that asks for more than lists, bytes and numpy arrays is refused. Its pairs get the field's ten "
        "contiguous folds, and images of equal bytes are stored once. All images are kept byte for byte, and decoded once as a check. The "
        "output appears when it is complete, or not at all.",
    )
    pack.add_argument("paths", nargs="+", type=Path, metavar="FILE", help=f"SRC.bin, if no folder is given, and OUT{SUFFIX}")
    _add_folder(pack)
    pack.set_defaults(command=_pack)
    return parser


def _add_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", type=Path, metavar="DIR", help="holds <Name>/<Name>_0001.jpg (.png, .jpeg): aligned, 112 x 112")
    command.add_argument(
        "--pairs", type=Path, metavar="PAIRS.txt", help="LFW format: 'folds n', then per fold n genuine and n impostor lines"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
