"""Any face model as one function: aligned RGB images in, embeddings out.

``load_embedder`` opens weights (see ``eval.weights``) or an .onnx graph; ``module_embedder`` takes a live network.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from eval.errors import EvalError
from eval.onnx_tensors import external_files
from eval.weights import KINDS, SUFFIXES, Backbone, load_backbone
from model.vit import IMAGE_SIZE

INPUT_RANGES = ("0..255", "-1..1")
NORMALISING_NODES = 8  # how deep into an ONNX graph its own normalisation is looked for


class Embedder:
    """A model behind one call: uint8 [b, 112, 112, 3] RGB -> float32 [b, D], not normalised, one row per image, in order.

    Args:
        forward: float32 [n, 3, 112, 112] on ``device``, with pixels in ``input_range`` -> [n, D].
        source: what the model is, for messages and reports.
        input_range: one of ``INPUT_RANGES``.
        batch_size: most images per forward.
        pad: fill the last batch up to ``batch_size`` with black images and drop their rows (for graphs of a fixed batch size).
        device: where pixels are normalised.
        files: what holds the model; empty for a live network.
        note: for people, what was unwrapped to get at the weights; "" if nothing.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        *,
        source: str,
        input_range: str,
        batch_size: int = 64,
        pad: bool = False,
        device: torch.device | str = "cpu",
        files: Sequence[Path] = (),
        note: str = "",
    ):
        if batch_size < 1:
            raise EvalError(f"batch size must be at least 1, got {batch_size}")
        self._forward, self._pad, self._files = forward, pad, files
        self.source, self.input_range, self.batch_size, self.device = source, input_range, batch_size, torch.device(device)
        self.note = note

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of the model's files and its input range, in hex: equal models embed equally. None for a live network."""
        if not self._files:
            return None
        content = hashlib.sha256(self.input_range.encode())
        for path in self._files:
            with path.open("rb") as file:
                content.update(hashlib.file_digest(file, "sha256").digest())
        return content.hexdigest()

    def __call__(self, images: np.ndarray | Tensor) -> np.ndarray:
        """Raises: EvalError when ``images`` are not as above, or the model returns anything but one vector per image."""
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or not len(images):
            found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise EvalError(f"expected images uint8 [b, {IMAGE_SIZE}, {IMAGE_SIZE}, 3] with b > 0, got {found}")
        return np.concatenate([self._embed(part) for part in images.split(self.batch_size)])

    def _embed(self, images: Tensor) -> np.ndarray:
        count = len(images)
        pixels = images.to(self.device).permute(0, 3, 1, 2).float()
        if self._pad and count < self.batch_size:
            pixels = torch.cat([pixels, pixels.new_zeros(self.batch_size - count, *pixels.shape[1:])])
        if self.input_range == "-1..1":
            pixels = (pixels / 255 - 0.5) / 0.5
        embeddings = self._forward(pixels)
        if embeddings.ndim != 2 or len(embeddings) != len(pixels):
            raise EvalError(f"{self.source}: expected one embedding per image, [{len(pixels)}, D], got shape {list(embeddings.shape)}")
        return embeddings[:count].float().cpu().numpy()


def load_embedder(model: str | Path, input_range: str = "auto", batch_size: int = 64) -> Embedder:
    """Open a model file, a run directory or a release.

    Args:
        model: an ``.onnx`` graph (runs on the CPU; its first output counts), or weights that ``eval.weights.load_backbone`` opens. They
            run in float32 on CUDA where there is one, else on the CPU.
        input_range: pixel values the model takes, one of ``INPUT_RANGES`` or ``"auto"``. Our backbones take -1..1. An ONNX graph is
            taken to normalise 0..255 itself when a Sub and after it a Mul or Div stand among its first 8 nodes, else to take -1..1.
        batch_size: images per forward; a graph whose batch size is fixed keeps its own.
    Raises: EvalError that names the file.
    """
    path = Path(model)
    if input_range not in ("auto", *INPUT_RANGES):
        raise EvalError(f"input range must be auto, {' or '.join(INPUT_RANGES)}, got {input_range!r}")
    if not path.exists():
        raise EvalError(f"{path}: no such model; give {KINDS} or an .onnx file")
    if path.is_file() and path.suffix == ".onnx":
        return _onnx_embedder(path, input_range, batch_size)
    if path.is_file() and path.suffix not in SUFFIXES:
        raise EvalError(f"{path}: unknown kind of model; give {KINDS} or an .onnx file")
    backbone = load_backbone(path)
    if input_range == "0..255":
        raise EvalError(f"{path}: backbone weights take pixels in -1..1, so --input-range 0..255 can't be right; leave it at auto")
    return backbone_embedder(backbone, batch_size)


def backbone_embedder(backbone: Backbone, batch_size: int = 64) -> Embedder:
    """Embed with loaded weights, which move to CUDA where there is one."""
    net = backbone.net.to("cuda" if torch.cuda.is_available() else "cpu")
    return module_embedder(net, source=str(backbone.file), batch_size=batch_size, files=[backbone.file], note=backbone.note)


def module_embedder(net: nn.Module, *, source: str, batch_size: int = 64, files: Sequence[Path] = (), note: str = "") -> Embedder:
    """Embed with a network that takes [b, 3, 112, 112] in [-1, 1], as training builds it.

    Each call runs it in eval mode, without gradients, on the device of its parameters, and leaves its mode as it was. ``files``: what
    it was loaded from, if it is to stay as it is; ``note``: see ``Embedder``.
    """

    def forward(pixels: Tensor) -> Tensor:
        was_training = net.training
        net.eval()
        try:
            with torch.no_grad():
                return net(pixels)
        finally:
            net.train(was_training)

    device = next(net.parameters()).device
    return Embedder(forward, source=source, input_range="-1..1", batch_size=batch_size, device=device, files=files, note=note)


def _onnx_embedder(path: Path, input_range: str, batch_size: int) -> Embedder:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; old exports list every weight as an input, one warning each
    options.intra_op_num_threads = torch.get_num_threads()  # a launcher gives each rank its part of the cores
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no narrower base class
        raise EvalError(f"{path}: onnxruntime can't open this graph: {error}") from error

    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise EvalError(f"{path}: expected a graph with one input, found {[each.name for each in inputs]}")
    shape, dtype = inputs[0].shape, inputs[0].type
    wanted = [3, IMAGE_SIZE, IMAGE_SIZE]
    sizes = [got if isinstance(got, int) else want for got, want in zip(shape[1:], wanted, strict=False)]  # a named size fits any
    if dtype != "tensor(float)" or len(shape) != 4 or sizes != wanted:
        raise EvalError(f"{path}: expected {inputs[0].name} to be a tensor(float) of shape {['b', *wanted]}, found {dtype} of {shape}")
    model = onnx.load(str(path), load_external_data=False)
    fixed_batch = isinstance(shape[0], int) and shape[0] > 0

    if input_range == "auto":
        input_range = "0..255" if normalises_itself(model.graph) else "-1..1"
    output = session.get_outputs()[0].name

    def forward(pixels: Tensor) -> Tensor:
        try:
            return torch.as_tensor(session.run([output], {inputs[0].name: pixels.contiguous().numpy()})[0])
        except Exception as error:  # as above
            raise EvalError(f"{path}: onnxruntime can't run this graph on {len(pixels)} images at once: {error}") from error

    return Embedder(
        forward,
        source=str(path),
        input_range=input_range,
        batch_size=shape[0] if fixed_batch else batch_size,
        pad=fixed_batch,
        files=[path, *(path.parent / location for location in external_files(model))],
    )


def normalises_itself(graph: onnx.GraphProto) -> bool:
    """Whether a Sub and after it a Mul or Div stand among the first nodes: such a graph takes pixels in 0..255."""
    first = [node.op_type for node in graph.node[:NORMALISING_NODES]]
    return "Sub" in first and any(op in ("Mul", "Div") for op in first[first.index("Sub") + 1 :])
