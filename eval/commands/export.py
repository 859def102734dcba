"""``python -m eval export``."""

import argparse
from pathlib import Path

from eval.commands.shared import check_output
from eval.errors import EvalError
from eval.onnx_export import BATCHES, MIN_COSINE, ExportReport, export_onnx, images_to_compare
from eval.onnx_graph import OPSETS
from eval.weights import KINDS, load_backbone

DESCRIPTION = (
    "Write weights as one ONNX file: input 'image', float32 [batch, 3, 112, 112], RGB in -1..1 (normalisation stays outside); output "
    "'embedding', float32 [batch, D], not normalised; any batch size. Before the file takes its name it passes ONNX's checker, runs in "
    f"onnxruntime, gives torch's embeddings (cosine >= {MIN_COSINE} in batches of {', '.join(map(str, BATCHES))}), and is held to the "
    "rules of an MFR-Ongoing submission; those that --fp16, --opset or the embedding size break are told."
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, type=Path, help=KINDS)
    command.add_argument("--onnx", required=True, type=Path, metavar="OUT.onnx", help="the file to write; an older one is replaced")
    command.add_argument(
        "--fp16", action="store_true", help="store the matrices as float16, half the file; arithmetic, input and output stay float32"
    )
    command.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        default=OPSETS[0],
        metavar=f"{OPSETS[0]}..{OPSETS[-1]}",
        help=f"ONNX operator set (default {OPSETS[0]}, which onnxruntime reads since 1.8)",
    )
    command.add_argument("--images", type=Path, metavar="DIR", help="aligned faces to compare on (default: synthetic ones)")
    command.add_argument("--ema", action="store_true", help="of a run: the mean weights (model.ema_decay) instead of the last ones")


def run(args: argparse.Namespace) -> None:
    if args.onnx.suffix != ".onnx":
        raise EvalError(f"{args.onnx}: the name of the output ends in .onnx")
    check_output(args.onnx, "--onnx")
    images, what = images_to_compare(args.images)
    backbone = load_backbone(args.model, ema=args.ema)
    note = f" (read {backbone.note})" if backbone.note else ""
    print(f"model {backbone.file}{note}: {backbone.preset}, embeddings of {backbone.net.embedding_size}", flush=True)
    report = export_onnx(backbone, args.onnx, images, opset=args.opset, float16=args.fp16, say=lambda text: print(text, flush=True))
    _print(report, args.onnx, what)


def _print(report: ExportReport, out: Path, images: str) -> None:
    print(f"{out}: {report.size / 2**20:.1f} MiB, operator set {report.opset}, IR version {report.ir_version}, {report.nodes} nodes")
    print(f"against torch on {images}:")
    for batch, cosine in report.cosine.items():
        print(f"  batch {batch:<2}  lowest cosine {cosine:.9f}, largest difference {report.difference[batch]:.2e}")
    for rule in report.notes:
        print(f"note: no submission to MFR-Ongoing, by its rule {rule.rule!r}: expected {rule.expected}, found {rule.found}")
    if not report.notes:
        print("passes MFR-Ongoing's rules for a submission")
