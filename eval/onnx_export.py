"""Backbone weights to an ONNX file that has been compared with them: ``export_onnx``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from data_pipeline.output import sync_folder, write_file
from data_pipeline.synthetic import draw_face
from eval.embedder import load_embedder, module_embedder
from eval.errors import EvalError
from eval.images import IMAGE_SUFFIXES, decode_image, read_image
from eval.mfr_package import MAX_EMBEDDING_SIZE, MAX_OPSET, RuleResult, check_package
from eval.onnx_graph import OPSETS, build_graph, store_weights_as_float16
from eval.release_folder import sha256
from eval.weights import Backbone

BATCHES = (1, 8, 32)  # in which the graph is compared with torch
MIN_COSINE = 0.9999


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it stands to torch."""

    size: int  # bytes
    opset: int
    ir_version: int
    nodes: int
    cosine: dict[int, float]  # batch size -> the lowest cosine of an image's two embeddings
    difference: dict[int, float]  # batch size -> the largest absolute difference of two values
    notes: list[RuleResult]  # rules of MFR-Ongoing that fail because of what was asked for


def export_onnx(
    backbone: Backbone,
    out: Path,
    images: np.ndarray,
    *,
    opset: int = OPSETS[0],
    float16: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write ``out``, which takes its name when all checks are passed: ONNX's own, onnxruntime's, torch's embeddings, MFR-Ongoing's rules.

    Args:
        images: uint8 [32, 112, 112, 3], to compare the embeddings of.
        opset: of ``eval.onnx_graph.OPSETS``; 14 is what onnxruntime 1.8 reads, and all later ones.
        float16: store the matrices as float16, see ``store_weights_as_float16``.
        say: called with a line before each part of the work.
    Raises: EvalError that names the check which failed; OSError.
    """
    say(f"building the graph, operator set {opset}")
    model = build_graph(backbone.net, opset)
    if float16:
        store_weights_as_float16(model.graph)
    about = {
        "preset": backbone.preset,
        "embedding_size": str(backbone.net.embedding_size),
        "opset": str(opset),
        "weights": "float16" if float16 else "float32",
        "weights_sha256": sha256(backbone.file),
        "input": "RGB, (x / 255 - 0.5) / 0.5",
    }
    onnx.helper.set_model_props(model, about)
    ir_version, nodes = model.ir_version, len(model.graph.node)
    fresh = out.with_name(f".{out.stem}.new-{os.getpid()}.onnx")
    try:
        write_file(fresh, model.SerializeToString())
        del model
        say("checking it")
        try:
            onnx.checker.check_model(str(fresh), full_check=True)
        except Exception as error:  # the checker's and shape inference's errors share no narrower base class
            raise EvalError(f"{out}: ONNX's checker refuses the graph: {' '.join(str(error).split())}") from error
        cosine, difference = _compare(backbone, fresh, images, say)
        asked_for = {"weights": float16, "versions": opset > MAX_OPSET, "embedding size": backbone.net.embedding_size > MAX_EMBEDDING_SIZE}
        say("holding it to MFR-Ongoing's rules")
        notes = [rule for rule in check_package(fresh) if not rule.ok]
        for rule in notes:
            if not asked_for.get(rule.rule):
                raise EvalError(f"{out}: fails the rule {rule.rule!r} of MFR-Ongoing: expected {rule.expected}, found {rule.found}")
        size = fresh.stat().st_size
        os.replace(fresh, out)
        sync_folder(out.parent)
    finally:
        fresh.unlink(missing_ok=True)
    return ExportReport(size, opset, ir_version, nodes, cosine, difference, notes)


def images_to_compare(folder: Path | None) -> tuple[np.ndarray, str]:
    """(uint8 [32, 112, 112, 3], what they are): the first by name in ``folder`` and below it, or drawn faces without one.

    Raises: EvalError when the folder holds too few, or one is no aligned face.
    """
    count = max(BATCHES)
    if folder is None:
        return np.stack([draw_face(0, identity, 0) for identity in range(count)]), f"{count} synthetic faces"
    if not folder.is_dir():
        raise EvalError(f"{folder}: no such folder of images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)[:count]
    if len(paths) < count:
        raise EvalError(f"{folder}: expected {count} images at least ({', '.join(IMAGE_SUFFIXES)}), found {len(paths)}")
    return np.stack([decode_image(read_image(path), str(path)) for path in paths]), f"the first {count} images of {folder}"


def _compare(backbone: Backbone, graph: Path, images: np.ndarray, say: Callable[[str], None]) -> tuple[dict[int, float], dict[int, float]]:
    """Lowest cosine and largest difference, by batch size. Raises: EvalError below ``MIN_COSINE``."""
    onnx_embedder, torch_embedder = (
        load_embedder(graph, batch_size=len(images)),
        module_embedder(backbone.net, source=str(backbone.file), batch_size=len(images)),
    )
    if onnx_embedder.input_range != torch_embedder.input_range:
        raise EvalError(f"{graph}: looks as if it normalised its input, which it does not; report this")
    cosine, difference = {}, {}
    for batch in BATCHES:
        say(f"comparing it with torch, batch {batch}")
        found, wanted = (embedder(images[:batch]).astype(np.float64) for embedder in (onnx_embedder, torch_embedder))
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
        cosine[batch] = float(((found * wanted).sum(axis=1) / norms).min())
        difference[batch] = float(np.abs(found - wanted).max())
        if not cosine[batch] >= MIN_COSINE:
            raise EvalError(
                f"{backbone.file}: the graph embeds otherwise than the weights: lowest cosine {cosine[batch]:.6f} in a batch of {batch}, "
                f"expected {MIN_COSINE} at least"
            )
    return cosine, difference
