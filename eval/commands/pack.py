"""``python -m eval pack``."""

import argparse
from pathlib import Path

from eval.commands.shared import Progress, add_pairs_folder, check_output, open_pairs
from eval.errors import EvalError
from eval.pair_pack import SUFFIX, write_pack

DESCRIPTION = (
    "Put pairs and their images into one safetensors file: pairs --pack gives the same numbers from it. From SRC.bin, a pickle, nothing is "
    "executed: one that asks for more than lists, bytes and numpy arrays is refused. Its pairs get the field's ten contiguous folds, and "
    "images of equal bytes are stored once. All images are kept byte for byte, and decoded once as a check. The output appears when it is "
    "complete, or not at all."
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.usage = f"%(prog)s [-h] (SRC.bin | --images DIR --pairs PAIRS.txt) OUT{SUFFIX}"
    command.add_argument("paths", nargs="+", type=Path, metavar="FILE", help=f"SRC.bin, if no folder is given, and OUT{SUFFIX}")
    add_pairs_folder(command)


def run(args: argparse.Namespace) -> None:
    *sources, out = args.paths
    if len(sources) > 1:
        raise EvalError(f"expected one source and one output, got {len(args.paths)} files: {' '.join(map(str, args.paths))}")
    if not out.name.endswith(SUFFIX):
        raise EvalError(f"{out}: the output comes last, and its name ends in {SUFFIX}")
    check_output(out, "the output")
    pairs = open_pairs(args.images, args.pairs, sources[0] if sources else None, "SRC.bin before the output")
    for remark in pairs.remarks():
        print(f"warning: {remark}")
    size = write_pack(pairs, out, progress=Progress())
    print(f"{out}: {len(pairs.pairs)} pairs in {pairs.num_folds} folds, {len(pairs.images)} images, {size} bytes")
