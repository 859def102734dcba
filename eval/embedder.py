"""Any face model as one function: aligned RGB images in, embeddings out.

``load_embedder`` takes a run directory, a .safetensors file of backbone weights, or an .onnx graph; ``module_embedder`` takes a live
network.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data_pipeline.names import is_plain_name
from eval.errors import EvalError
from model.vit import IMAGE_SIZE, build_vit, preset_of

INPUT_RANGES = ("0..255", "-1..1")
NORMALISING_NODES = 8  # how deep into an ONNX graph its own normalisation is looked for


class Embedder:
    """A model behind one call: uint8 [b, 112, 112, 3] RGB -> float32 [b, D], not normalised, one row per image, in order.

    Args:
        forward: float32 [n, 3, 112, 112] with pixels in ``input_range`` -> [n, D].
        source: what the model is, for messages and reports.
        input_range: one of ``INPUT_RANGES``.
        batch_size: most images per forward.
        pad: fill the last batch up to ``batch_size`` with black images and drop their rows (for graphs of a fixed batch size).
    """

    def __init__(
        self, forward: Callable[[np.ndarray], np.ndarray], *, source: str, input_range: str, batch_size: int = 64, pad: bool = False
    ):
        if batch_size < 1:
            raise EvalError(f"batch size must be at least 1, got {batch_size}")
        self._forward, self._pad = forward, pad
        self.source, self.input_range, self.batch_size = source, input_range, batch_size

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Raises: EvalError when ``images`` are not as above, or the model returns anything but one vector per image."""
        if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or not len(images):
            raise EvalError(f"expected images uint8 [b, {IMAGE_SIZE}, {IMAGE_SIZE}, 3] with b > 0, got {images.dtype} {list(images.shape)}")
        return np.concatenate([self._embed(images[i : i + self.batch_size]) for i in range(0, len(images), self.batch_size)])

    def _embed(self, images: np.ndarray) -> np.ndarray:
        count = len(images)
        if self._pad and count < self.batch_size:
            images = np.concatenate([images, np.zeros((self.batch_size - count, *images.shape[1:]), np.uint8)])
        pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
        if self.input_range == "-1..1":
            pixels = (pixels / 255 - 0.5) / 0.5
        embeddings = self._forward(pixels)
        if embeddings.ndim != 2 or len(embeddings) != len(images):
            raise EvalError(f"{self.source}: expected one embedding per image, [{len(images)}, D], got shape {list(embeddings.shape)}")
        return embeddings[:count].astype(np.float32, copy=False)


def load_embedder(model: str | Path, input_range: str = "auto", batch_size: int = 64) -> Embedder:
    """Open a model file or a run directory.

    Args:
        model: an ``.onnx`` graph (runs on the CPU; its first output counts); a ``.safetensors`` of backbone weights under the released
            key names (their shapes tell the preset), or a run directory, of which the newest committed checkpoint is taken. Weights run
            in float32 on CUDA where there is one, else on the CPU.
        input_range: pixel values the model takes, one of ``INPUT_RANGES`` or ``"auto"``. Our backbones take -1..1. An ONNX graph is
            taken to normalise 0..255 itself when a Sub and after it a Mul or Div stand among its first 8 nodes, else to take -1..1.
        batch_size: images per forward; a graph whose batch size is fixed keeps its own.
    Raises: EvalError that names the file.
    """
    path = Path(model)
    if input_range not in ("auto", *INPUT_RANGES):
        raise EvalError(f"input range must be auto, {' or '.join(INPUT_RANGES)}, got {input_range!r}")
    if not path.exists():
        raise EvalError(f"{path}: no such model; give a run directory, a .safetensors or an .onnx file")
    if path.is_file() and path.suffix == ".onnx":
        return _onnx_embedder(path, input_range, batch_size)
    if path.is_dir():
        weights = _latest_backbone(path)
    elif path.suffix == ".safetensors":
        weights = path
    else:
        raise EvalError(f"{path}: unknown kind of model; give a run directory, a .safetensors or an .onnx file (pickles are never opened)")
    if input_range == "0..255":
        raise EvalError(f"{path}: backbone weights take pixels in -1..1, so --input-range 0..255 can't be right; leave it at auto")
    net = _load_backbone(weights).to("cuda" if torch.cuda.is_available() else "cpu")
    return module_embedder(net, source=str(weights), batch_size=batch_size)


def module_embedder(net: nn.Module, *, source: str, batch_size: int = 64) -> Embedder:
    """Embed with a network that takes [b, 3, 112, 112] in [-1, 1], as training builds it.

    Each call runs it in eval mode, without gradients, on the device of its parameters, and leaves its mode as it was.
    """

    def forward(pixels: np.ndarray) -> np.ndarray:
        was_training = net.training
        net.eval()
        try:
            with torch.no_grad():
                return net(torch.from_numpy(pixels).to(next(net.parameters()).device)).float().cpu().numpy()
        finally:
            net.train(was_training)

    return Embedder(forward, source=source, input_range="-1..1", batch_size=batch_size)


def _latest_backbone(run: Path) -> Path:
    pointer = run / "checkpoints" / "latest"
    if not pointer.is_file():
        raise EvalError(f"{run}: a run with no complete checkpoint ({pointer} is missing); train until one is written, or name another run")
    _refuse_outside(pointer, pointer.parent)
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not is_plain_name(name):
        raise EvalError(f"{pointer}: expected the name of a folder beside it, found {name!r:.80}")
    weights = pointer.parent / name / "backbone.safetensors"
    if not weights.is_file():
        raise EvalError(f"{run}: a run with no complete checkpoint ({pointer} names {name}, which holds no {weights.name})")
    _refuse_outside(weights, pointer.parent)
    return weights


def _refuse_outside(path: Path, folder: Path) -> None:
    """A run may come from a stranger: its links must not choose which files of this machine are opened."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise EvalError(f"{path}: leads out of {folder}, to {path.resolve()}; copy it there, or give a .safetensors file")


def _load_backbone(path: Path) -> nn.Module:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (a safetensors handle is not iterable)
    except SafetensorError as error:
        raise EvalError(f"{path}: not a readable safetensors file: {error}") from error
    try:
        name = preset_of(state)
    except ValueError as error:
        raise EvalError(f"{path}: {error}") from error
    if metadata.get("preset", name) != name:
        raise EvalError(f"{path}: metadata names the preset {metadata['preset']}, but the weights have the shapes of {name}")
    net = build_vit(name, embedding_size=len(state["feature.2.weight"]))
    net.load_state_dict(state)
    return net


def _onnx_embedder(path: Path, input_range: str, batch_size: int) -> Embedder:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; old exports list every weight as an input, one warning each
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
    fixed_batch = isinstance(shape[0], int) and shape[0] > 0

    if input_range == "auto":
        input_range = "0..255" if _normalises_itself(path) else "-1..1"
    output = session.get_outputs()[0].name

    def forward(pixels: np.ndarray) -> np.ndarray:
        try:
            return session.run([output], {inputs[0].name: pixels})[0]
        except Exception as error:  # as above
            raise EvalError(f"{path}: onnxruntime can't run this graph on {len(pixels)} images at once: {error}") from error

    return Embedder(
        forward,
        source=str(path),
        input_range=input_range,
        batch_size=shape[0] if fixed_batch else batch_size,
        pad=fixed_batch,
    )


def _normalises_itself(path: Path) -> bool:
    first = [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node[:NORMALISING_NODES]]
    return "Sub" in first and any(op in ("Mul", "Div") for op in first[first.index("Sub") + 1 :])
