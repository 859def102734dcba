"""``python -m data_pipeline pack | verify | info | synthetic``: make, prove and describe sets of record shards."""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.output import refuse_existing
from data_pipeline.pack import pack, read_identities
from data_pipeline.shard_set import open_set
from data_pipeline.synthetic import FOLDER_NAME, write_pairs, write_synthetic
from data_pipeline.verify import verify

_MANY = 50  # findings that `verify` prints


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 `verify` found damage, 2 bad input (one line on stderr says what), 130 Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: no unfinished output is left", file=sys.stderr)
        return 130


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # unwinds, so that unfinished output is removed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "pack",
        help="image folders -> shuffled record shards",
        description="Pack SRC_DIR/<identity>/<image> (112x112, aligned) into OUT_DIR: globally shuffled shards shard_00000.rec ..., one "
        "index shards.idx over them all, and shards.json (counts, identities, a CRC32 per record). JPEG files are stored byte for byte; "
        "other formats become JPEG once. OUT_DIR appears when it is complete, or not at all.",
    )
    command.add_argument("source", type=Path, metavar="SRC_DIR", help="one folder per identity, images in it")
    command.add_argument("out", type=Path, metavar="OUT_DIR", help="the set to make")
    command.add_argument(
        "--shards",
        type=int,
        required=True,
        metavar="N",
        help="number of record files; whole files are re-ordered every epoch, so use several, with some thousand images each or more",
    )
    command.add_argument("--seed", type=int, default=0, help="of the shuffle: the same source and seed give the same bytes (default 0)")
    command.add_argument(
        "--identities",
        type=Path,
        metavar="FILE.json",
        help="pack these identities only: a JSON list of folder names, or an object of such lists, of which --split names one",
    )
    command.add_argument("--split", help="which list of FILE.json, such as train")
    command.add_argument("--force", action="store_true", help="replace an existing set in OUT_DIR, once the new one is complete")
    command.set_defaults(run=_pack)

    command = commands.add_parser(
        "verify",
        help="read every record and name what is damaged",
        description="Read every record of a set: framing, lengths, labels, JPEG start and end, CRC32 (packed sets). Prints one line per "
        "finding, with shard, offset and key. Exit code 0: clean, 1: findings, 2: no set there.",
    )
    command.add_argument("set", type=Path, metavar="SET", help="OUT_DIR of pack, a folder with train.rec and train.idx, or a .rec file")
    command.set_defaults(run=_verify)

    says = "say what a set holds: images, identities, shards, layout"
    command = commands.add_parser("info", help=says, description=says.capitalize() + ".")
    command.add_argument("set", type=Path, metavar="SET", help="as for verify")
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "synthetic",
        help="draw a set of synthetic faces",
        description="Draw faces of people who do not exist into OUT_DIR/id_00000/id_00000_0001.jpg ... (112x112). Each image depends on "
        "(seed, identity, image) alone; sets of one seed with --first-identity ranges apart share nobody.",
    )
    command.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to make")
    command.add_argument("--identities", type=int, default=200, metavar="N", help="default 200")
    command.add_argument("--images", type=int, default=20, metavar="N", help="per identity, default 20")
    command.add_argument("--seed", type=int, default=0, help="default 0")
    command.add_argument("--first-identity", type=int, default=0, metavar="N", help="number of the first identity, default 0")
    command.add_argument("--force", action="store_true", help="replace existing faces in OUT_DIR, once the new ones are complete")
    command.add_argument("--pairs", type=Path, metavar="PAIRS.txt", help="also write verification pairs over these faces, in LFW's format")
    command.add_argument("--folds", type=int, default=10, help="of the pairs, without common identities; default 10")
    command.add_argument("--pairs-per-fold", type=int, default=300, metavar="N", help="N matched and N mismatched pairs; default 300")
    command.set_defaults(run=_synthetic)
    return parser


def _pack(arguments: argparse.Namespace) -> int:
    if arguments.split is not None and arguments.identities is None:
        raise DataError("--split: needs --identities FILE.json, the file that holds the split")
    names = None if arguments.identities is None else read_identities(arguments.identities, arguments.split)
    sidecar = pack(
        arguments.source, arguments.out, arguments.shards, seed=arguments.seed, identities=names, force=arguments.force, progress=True
    )
    size = sum(shard.bytes for shard in sidecar.shards)
    print(f"{arguments.out}: {sidecar.num_images} images of {sidecar.num_classes} identities in {len(sidecar.shards)} shards, {size} bytes")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    report = verify(arguments.set, progress=True)
    for finding in report.findings[:_MANY]:
        print(finding)
    if len(report.findings) > _MANY:
        print(f"... and {len(report.findings) - _MANY} more")
    print(f"{arguments.set}: {report.records} records read, {report.images} images, {len(report.findings)} findings")
    return 1 if report.findings else 0


def _info(arguments: argparse.Namespace) -> int:
    faces = open_set(arguments.set)
    counts = faces.images_per_class
    seed = "not known" if faces.sidecar is None else str(faces.sidecar.seed)
    layout = "packed (sidecar with CRC32s)" if faces.sidecar else f"field (.rec and .idx, {faces.other_records} records without an image)"
    for name, value in {
        "layout": layout,
        "images": faces.num_images,
        "identities": f"{faces.num_classes} ({int((counts == 0).sum())} without an image)" if (counts == 0).any() else faces.num_classes,
        "images per identity": f"min {counts.min()}, median {np.median(counts):g}, max {counts.max()}",
        "shards": len(faces.shards),
        "bytes": sum(faces.shard_bytes),
        "seed": seed,
    }.items():
        print(f"{name:<21}{value}")
    return 0


def _synthetic(arguments: argparse.Namespace) -> int:
    out, people = arguments.out, (arguments.identities, arguments.images)
    refuse_existing(out, FOLDER_NAME, arguments.force)
    if arguments.pairs is not None:  # first: it says in a moment when the set is too small
        if out.resolve() in arguments.pairs.resolve().parents:
            raise DataError(f"--pairs {arguments.pairs}: must lie outside {out}, which holds faces alone")
        write_pairs(arguments.pairs, *people, arguments.folds, arguments.pairs_per_fold, arguments.seed, arguments.first_identity)
    write_synthetic(out, *people, arguments.seed, arguments.first_identity, force=arguments.force, progress=True)
    print(f"{out}: {arguments.images} images of each of {arguments.identities} synthetic identities")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
