"""``python -m eval release``."""

import argparse
from pathlib import Path

from data_pipeline.output import refuse_existing
from eval.embedder import module_embedder
from eval.errors import EvalError
from eval.release import write_release
from eval.release_card import ReleaseFacts, results_of, run_facts
from eval.release_folder import CARD, CHECKSUMS, CONFIG, FILES, OWNED, is_release
from eval.weights import KINDS, load_backbone

DESCRIPTION = (
    f"Write weights as a folder for others: {', '.join(FILES)} and {CHECKSUMS}. Of a run the card tells the recipe (without secrets and "
    "folders), the step and the size of the training set; of bare weights it says that these are not stated. The folder appears when it is "
    "complete, or not at all."
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, metavar="RUN_OR_WEIGHTS", help=KINDS.replace(" a release,", ""))
    command.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to write")
    command.add_argument("--results", type=Path, nargs="+", default=[], metavar="RESULT.json", help="for the card; of these very weights")
    command.add_argument("--name", help=f"for {CONFIG} and {CARD} (default: the folder's)")
    command.add_argument("--licence", help="of the weights, as an identifier such as cc-by-nc-4.0 (default: not stated)")
    command.add_argument("--ema", action="store_true", help="of a run: the mean weights (model.ema_decay) instead of the last ones")
    command.add_argument("--force", action="store_true", help="replace an older release in OUT_DIR")


def run(args: argparse.Namespace) -> None:
    name = args.name or args.out.resolve().name
    for option, text in (("--name", name), ("--licence", args.licence or "")):
        if not text.isprintable():
            raise EvalError(f"{option} {text!r}: expected one line of text")
    if is_release(args.model):
        raise EvalError(f"{args.model}: is a release already; copy it, or name the run that it was made of")
    refuse_existing(args.out, OWNED, args.force)
    backbone = load_backbone(args.model, ema=args.ema)
    results = results_of(args.results, module_embedder(backbone.net, source=str(backbone.file), files=[backbone.file]).digest)
    facts = run_facts(args.model, backbone) if args.model.is_dir() else {}
    write_release(backbone, args.out, ReleaseFacts(name=name, licence=args.licence, results=results, **facts), force=args.force)
    note = f" (read {backbone.note})" if backbone.note else ""
    print(f"{args.out}: {backbone.preset}, embeddings of {backbone.net.embedding_size}, from {backbone.file}{note}")
