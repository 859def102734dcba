"""What several commands have in common: options, checks of outputs, progress."""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from eval.cache import EmbeddingCache
from eval.decoding import DECODERS
from eval.embedder import INPUT_RANGES, Embedder, load_embedder
from eval.errors import EvalError
from eval.pair_pack import open_pack
from eval.pair_set import PairSet
from eval.pairs_file import find_pairs
from eval.weights import KINDS
from train.table import format_seconds


def add_model(command: argparse.ArgumentParser) -> None:
    """--model, --input-range and --batch-size, for ``open_model``."""
    command.add_argument("--model", required=True, type=Path, help=f"{KINDS} or an .onnx file")
    command.add_argument(
        "--input-range",
        choices=("auto", *INPUT_RANGES),
        default="auto",
        help="pixel values that the model takes; auto: 0..255 for an ONNX graph that begins with a Sub and a Mul or Div, else -1..1",
    )
    command.add_argument("--batch-size", type=int, default=64, help="images per forward (default 64; a fixed-batch graph keeps its own)")


def open_model(args: argparse.Namespace) -> Embedder:
    """The model that the command line names, and a line about it on stdout. Collectives: one gather."""
    embedder = args.ranks.together(lambda: load_embedder(args.model, args.input_range, args.batch_size))
    how = "read from the model" if args.input_range == "auto" else "as told"
    note = f" (read {embedder.note})" if embedder.note else ""
    args.ranks.say(f"model {embedder.source}{note}\ninput range {embedder.input_range} ({how}), batch size {embedder.batch_size}")
    return embedder


def add_embedding(command: argparse.ArgumentParser, *, aligned: bool = True) -> None:
    """--decoder and --cache, for ``embed_options``; faces that are not ``aligned`` leave no choice of a decoder."""
    command.set_defaults(decoder="pillow")
    if aligned:
        what = "what decodes images: Pillow in threads (default), or DALI, on the GPU if any"
        command.add_argument("--decoder", choices=DECODERS, help=what)
    command.add_argument("--cache", type=Path, metavar="DIR", help="keep embeddings there, and take them from there the next time")


def embed_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of ``eval.embed.embed``."""
    cache = EmbeddingCache(args.cache) if args.cache else None
    progress = Progress if args.ranks.is_first else None
    return {"group": args.ranks.group, "decoder": args.decoder, "cache": cache, "progress": progress}


def add_pairs_folder(command: argparse.ArgumentParser) -> None:
    """--images and --pairs, for ``open_pairs``."""
    command.add_argument("--images", type=Path, metavar="DIR", help="holds the images that the list names: aligned, 112 x 112")
    command.add_argument(
        "--pairs",
        type=Path,
        metavar="PAIRS.txt",
        help="the list as its authors wrote it: LFW's, CALFW's or CPLFW's, lines `image image 1|0`, CFP's folder Protocol/Split/FP or FF",
    )


def open_pairs(images: Path | None, pairs_file: Path | None, pack: Path | None, pack_option: str) -> PairSet:
    """The pairs of a folder or of a pack, whichever of the two the command line gives."""
    if pack and not images and not pairs_file:
        return open_pack(pack)
    if images and pairs_file and not pack:
        return find_pairs(images, pairs_file)
    raise EvalError(f"give either --images DIR and --pairs PAIRS.txt, or {pack_option}")


def about_model(embedder: Embedder) -> dict[str, Any]:
    """What every result that ``--json`` writes says of its model."""
    return {
        "model": embedder.source,
        "model_sha256": embedder.digest,
        "input_range": embedder.input_range,
        "batch_size": embedder.batch_size,
    }


def check_outputs(args: argparse.Namespace) -> None:
    """Before the work: can all be written that --json, --cache, --plots and --state name? The first rank looks, for it writes.

    Raises: what is wrong, on all ranks. Collectives: one gather.
    """
    args.ranks.together(lambda: _check_outputs(args) if args.ranks.is_first else None)


def _check_outputs(args: argparse.Namespace) -> None:
    if args.json:
        check_output(args.json, "--json")
    for name in ("cache", "plots", "state"):
        folder: Path | None = getattr(args, name, None)
        if folder:
            _check_folder(folder, f"--{name}")


def check_output(path: Path, option: str) -> None:
    """Before the work: can the file be written?"""
    if not path.parent.is_dir():
        raise EvalError(f"{path}: no such folder: {path.parent}")
    if path.is_dir():
        raise EvalError(f"{path}: is a folder; {option} names a file")
    _check_writable(path.parent, path)


def _check_folder(path: Path, option: str) -> None:
    """Can files be written to the folder, or the folder be made?"""
    if not path.parent.is_dir():
        raise EvalError(f"{path}: no such folder: {path.parent}")
    if path.exists() and not path.is_dir():
        raise EvalError(f"{path}: is a file; {option} names a folder")
    _check_writable(path if path.exists() else path.parent, path)


def _check_writable(folder: Path, output: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise EvalError(f"{output}: can't be written: {error.strerror}") from error


class Progress:
    """One line on stderr, rewritten at most once a second on a terminal, and written every 30 s elsewhere: done, rate, ETA.

    Args:
        unit: of what is counted, in the plural.
    """

    def __init__(self, unit: str = "images") -> None:
        self._unit = unit
        self._tty = sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last < (1 if self._tty else 30):
            return
        self._last = now
        rate = done / max(now - self._start, 1e-9)
        eta = format_seconds((total - done) / rate) if done else "unknown"
        line = f"{done}/{total} {self._unit}, {rate:.0f}/s, ETA {eta}"
        print(f"\r{line:<60}" if self._tty else line, end="\n" if done == total or not self._tty else "", file=sys.stderr, flush=True)
