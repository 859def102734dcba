"""``python -m data_pipeline pack | unpack | verify | info | preview | synthetic``: make, prove, describe and look at sets of shards."""

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.info import IMAGES_PER_SECOND_AND_NODE, describe, node_memory
from data_pipeline.output import refuse_existing
from data_pipeline.pack import FINDINGS_NAME, pack, unfinished
from data_pipeline.quarantine import quarantine_path, write_quarantine
from data_pipeline.shard_set import open_set
from data_pipeline.shard_writer import Policy
from data_pipeline.sources import read_identities
from data_pipeline.synthetic import FOLDER_NAME, write_pairs, write_synthetic
from data_pipeline.unpack import unpack
from data_pipeline.verify import Report, verify

_MANY = 50  # findings that `verify` prints
_VERIFY = """\
Read every record of a set and print a line for everything that is wrong, with shard, offset and key.

Checked are, record by record: magic number, continuation flag, length and number of labels; that records follow each other without a
gap, and that the index lists them all; the label, a whole number in [0, identities); JPEG start and end; 112x112 pixels by the JPEG's
frame header; every code of the image, by a decoder that forgives nothing. A packed set is also compared with what pack wrote of it:
SHA-256 of its files, number of records per shard, label and CRC32 of every image. A field set (train.rec, train.idx) has no checksums:
about a third of the single bytes that change inside a JPEG make decoding fail, the others stay unseen.

Records that must not be trained on are listed in SET/quarantine.jsonl (packed) or train.quarantine.jsonl beside train.rec: the loader,
pack and info leave them out. The list is written anew by every run, and removed when no record is unfit. What is wrong with other files,
or between records, has to be mended.

exit codes: 0 nothing is wrong, 1 something is, 2 there is no set that can be read, 130 stopped by Ctrl-C"""


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 `verify` found damage, 2 bad input (stderr says what), 130 Ctrl-C, 143 SIGTERM."""
    arguments = _parsed(argv)
    try:
        return arguments.run(arguments)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if left := _left(arguments):
            print(left, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {_left(arguments) or 'no unfinished output is left'}", file=sys.stderr)
        return 130
    except SystemExit:  # of _stop
        print(f"stopped: {_left(arguments) or 'no unfinished output is left'}", file=sys.stderr)
        raise


def _left(arguments: argparse.Namespace) -> str | None:
    """What a command that failed or was stopped left to go on from."""
    return unfinished(arguments.out) if arguments.run is _pack else None


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # unwinds, so that unfinished output is removed


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, left_over = parser.parse_known_args(argv)
    # Of key=value words argparse takes those before the first option alone.
    if left_over and not ("overrides" in arguments and all("=" in word and word[0] != "-" for word in left_over)):
        parser.error(f"unrecognized arguments: {' '.join(left_over)}")
    if left_over:
        arguments.overrides += left_over
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "pack",
        help="image folders or record sets -> shuffled record shards",
        description="Pack what each SRC holds into OUT_DIR: globally shuffled shards shard_00000.rec ..., their index shards.idx and table "
        "records.npy (place, label and CRC32 of every image), identities.json, and shards.json over all of it. JPEG images are stored byte "
        "for byte; other formats become JPEG once. OUT_DIR appears when it is complete. A pack that was stopped or killed goes on from its "
        "finished shards, in the hidden folder .OUT_DIR.packing, when the same command is given again.",
    )
    command.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="SRC_DIR",
        help="a folder <identity>/<image> of aligned 112x112 faces, a folder with train.rec and train.idx (a .lst beside them names the "
        "identities), a .rec file, or a packed set. Of several, the labels of each begin where those of the one before end; no identities "
        "are united",
    )
    command.add_argument("out", type=Path, metavar="OUT_DIR", help="the set to make")
    command.add_argument(
        "--shards",
        type=int,
        required=True,
        metavar="N",
        help="number of record files; a worker writes one at a time, so take several per core, with some thousand images each or more",
    )
    command.add_argument("--seed", type=int, default=0, help="of the shuffle: the same sources and seed give the same bytes (default 0)")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    command.add_argument(
        "--identities",
        type=Path,
        metavar="FILE.json",
        help="pack these identities only: a JSON list of folder names, or an object of such lists, of which --split names one",
    )
    command.add_argument("--split", help="which list of FILE.json, such as train")
    command.add_argument(
        "--wrong-size",
        choices=("error", "drop", "resize"),
        default="error",
        help="of images that are not 112x112: stop there, leave them out, or scale and encode them anew (default error)",
    )
    command.add_argument(
        "--unreadable",
        choices=("error", "drop"),
        default="error",
        help="of images that are damaged or no images: stop there, or leave them out (default error)",
    )
    command.add_argument(
        "--duplicates",
        choices=("report", "drop"),
        default="report",
        help="of images with the same bytes: report them, or leave out all but the first of an identity, and all of those that several "
        "identities claim, which takes reading the sources twice (default report)",
    )
    command.add_argument("--force", action="store_true", help="replace an existing set in OUT_DIR, once the new one is complete")
    command.set_defaults(run=_pack)

    command = commands.add_parser(
        "unpack",
        help="record shards -> image folders",
        description="Write every image of a set, byte for byte, as OUT_DIR/<identity>/<key>.jpg (or .png): the inverse of pack. Records in "
        "quarantine are left out. OUT_DIR appears when it is complete, or not at all.",
    )
    command.add_argument("set", type=Path, metavar="SET", help="as for verify")
    command.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to make")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    command.set_defaults(run=_unpack)

    command = commands.add_parser(
        "verify",
        help="read every record, name what is damaged, and put it in quarantine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_VERIFY,
    )
    command.add_argument("set", type=Path, metavar="SET", help="OUT_DIR of pack, a folder with train.rec and train.idx, or a .rec file")
    command.add_argument("--no-decode", action="store_true", help="do not decode the images: several times as fast")
    command.add_argument("--no-quarantine", action="store_true", help="only say what is wrong; write and remove nothing")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    command.set_defaults(run=_verify)

    command = commands.add_parser(
        "info",
        help="say what a set holds, and what reading it asks of storage and memory",
        description="Say what a set holds (layout, images, identities, shards, quarantine), how much an epoch reads, what storage must "
        "give each node at a throughput, and whether the set fits the page cache of the node that this runs on.",
    )
    command.add_argument("set", type=Path, metavar="SET", help="as for verify")
    command.add_argument(
        "--images-per-second",
        type=float,
        metavar="N",
        help=f"throughput of training over all nodes (default {IMAGES_PER_SECOND_AND_NODE} a node: vit_l on eight H100s, an estimate)",
    )
    command.add_argument("--nodes", type=int, default=1, metavar="K", help="that share the images of an epoch (default 1)")
    command.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "preview",
        help="draw what the augmentation of a recipe makes of a set's images",
        description="Write a sheet of some images of SET, a row each: as stored, each change of the recipe's data.augment alone and on "
        "every image, and several draws of all of them as training would see them. It is the loader's own DALI graph that makes them.",
    )
    command.add_argument("set", type=Path, metavar="SET", help="as for verify")
    command.add_argument("out", type=Path, metavar="OUT.png", help="the sheet to write; .jpg makes a smaller one with JPEG's losses")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, e.g. data.augment.blur=0.5")
    command.add_argument("--config", type=Path, metavar="RECIPE.yaml", help="whose augmentation; default: every change, moderate")
    command.add_argument("--images", type=int, default=6, metavar="N", help="rows (default 6)")
    command.add_argument("--seed", type=int, default=0, help="of the choice of images and of what is drawn for them (default 0)")
    command.add_argument("--force", action="store_true", help="replace an existing sheet")
    command.set_defaults(run=_preview)

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
    policy = Policy(arguments.wrong_size, arguments.unreadable, arguments.duplicates)
    options = {"seed": arguments.seed, "identities": names, "policy": policy, "workers": arguments.workers, "force": arguments.force}
    packed = pack(arguments.sources, arguments.out, arguments.shards, **options, progress=True)
    for kind, count in sorted(packed.findings.items()):
        print(f"{count} images: {kind}, such as")
        for finding in packed.examples:
            if finding["kind"] == kind:
                print("  " + ", ".join(str(value) for name, value in finding.items() if name != "kind"))
    if packed.findings:
        print(f"all of them: {arguments.out / FINDINGS_NAME}")
    sidecar = packed.sidecar
    size = sum(shard.bytes for shard in sidecar.shards)
    print(f"{arguments.out}: {sidecar.num_images} images of {sidecar.num_classes} identities in {len(sidecar.shards)} shards, {size} bytes")
    return 0


def _unpack(arguments: argparse.Namespace) -> int:
    unpacked = unpack(arguments.set, arguments.out, workers=arguments.workers, progress=True)
    if unpacked.quarantined:
        print(f"left out: {unpacked.quarantined} records in quarantine")
    if unpacked.empty_identities:
        print(f"left out: {unpacked.empty_identities} identities without an image; if the folder is packed, labels close that gap")
    print(f"{arguments.out}: {unpacked.images} images of {unpacked.identities} identities")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    report = verify(arguments.set, decode=not arguments.no_decode, workers=arguments.workers, progress=True)
    for finding in report.findings[:_MANY]:
        print(finding)
    if len(report.findings) > _MANY:
        print(f"... and {len(report.findings) - _MANY} more")
    if not arguments.no_quarantine:
        _write_quarantine(report)
    if others := sum(not finding.unfit for finding in report.findings):
        print(f"quarantine does not help against {others} of the findings, which are of files or of places between records: mend them")
    print(f"{arguments.set}: {report.records} records read, {report.images} images, {len(report.findings)} findings")
    return 1 if report.findings else 0


def _write_quarantine(report: Report) -> None:
    path, unfit = quarantine_path(report.root), report.unfit
    stale = path.exists() and not unfit
    try:
        write_quarantine(report.root, report.shards, unfit)
    except OSError as error:
        print(f"{path}: the quarantine list cannot be {'removed' if stale else 'written'} ({error.strerror})")
        return
    if unfit:
        print(f"{len(unfit)} records put in quarantine: {path}; the loader leaves them out")
    elif stale:
        print(f"no record is unfit: the quarantine list of an earlier run is removed: {path}")


def _info(arguments: argparse.Namespace) -> int:
    told = describe(open_set(arguments.set), node_memory(), images_per_second=arguments.images_per_second, nodes=arguments.nodes)
    print(json.dumps(asdict(told), indent=1) if arguments.json else "\n".join(told.lines()))
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    # Here, because DALI and torch are slow to import and no other command needs them.
    from data_pipeline.augment import Augment
    from data_pipeline.preview import preview

    augment = Augment(**_recipe_augment(arguments.config, arguments.overrides))
    rows = preview(arguments.set, arguments.out, augment, images=arguments.images, seed=arguments.seed, force=arguments.force)
    print(f"{arguments.out}: {len(rows)} images of {arguments.set}; from above:", *rows, sep="\n  ")
    return 0


def _recipe_augment(config: Path | None, overrides: list[str]) -> dict[str, Any]:
    """``data.augment`` of a recipe; of no recipe, ``preview.MODERATE``. Raises DataError for what ``load_run_config`` refuses."""
    # Here, because train is built on data_pipeline: none of its modules imports train. This command alone knows both.
    from data_pipeline.preview import MODERATE
    from train.config import load_run_config, validate
    from train.document import ConfigError, Document

    try:
        if config is not None:
            run = load_run_config(config, overrides)
        else:
            least = {"output": "none", "stages": [{"name": "none", "epochs": 1}]}  # what no recipe may lack
            document = Document("no recipe", {"data": {"path": "none", "augment": asdict(MODERATE)}, **least})
            for assignment in overrides:
                document.override(assignment)
            run = validate(document)
    except ConfigError as error:
        raise DataError(str(error)) from None
    return run.data.augment.model_dump()


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
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    sys.exit(main())
