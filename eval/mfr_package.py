"""Whether a model may be submitted to MFR-Ongoing: every published rule, each with what was expected and what was found.

The rules, and where they are published (github.com/deepinsight/insightface):

- ``challenges/mfr/README.md``: one ONNX file, zipped with nothing else; input [*, 3, 112, 112] in RGB order; no float16 weights;
  onnxruntime 1.8 opens it, which reads operator set 14 and IR version 7 at most (onnxruntime's own table of versions);
- ``recognition/arcface_torch/onnx_helper.py``, which that page names as the check to pass: the file holds 1024 MiB at most and at least 8
  nodes; exactly one output; no initializer of less than 4 bytes an element; an embedding of 512 values at most;
- the same file, on pixels: it looks at the NAMES of the first 8 nodes. One that begins with Sub or _minus and one that begins with Mul or
  _mul, in whatever order, and the graph is fed 0..255; else (x - 127.5) / 127.5. A graph that normalises under other names would do so
  twice, and one that has such names for another reason would not be normalised at all. So here neither names nor types of nodes may say
  that the graph normalises: normalisation stands outside;
- ours on top, since that check mends it: the batch size is dynamic, and batches of 1 and 32 give finite embeddings.

Not judged: 15 ms an image on a V100, which is a matter of their machine, and the order of the channels, which no graph tells.

Nothing of a package is written to where it says: of its one file, no more than the permitted size is unpacked, into a temporary folder.
"""

import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from eval.embedder import NORMALISING_NODES, normalises_itself
from eval.errors import EvalError
from eval.onnx_tensors import tensors
from model.vit import IMAGE_SIZE

MAX_BYTES = 1024 * 2**20  # of the ONNX file
MAX_EMBEDDING_SIZE = 512
MIN_NODES = 8
MAX_OPSET, MAX_IR = 14, 7  # onnxruntime 1.8, the server's
BATCHES = (1, 32)
_SHAPE = [3, IMAGE_SIZE, IMAGE_SIZE]
_FLOATS = {number for name, number in onnx.TensorProto.DataType.items() if "FLOAT" in name or name in ("DOUBLE", "COMPLEX64", "COMPLEX128")}

EXPECTED = {  # name of the rule -> what it expects, in the order in which they are checked
    "package": "a zip of exactly one file, NAME.onnx, at its root (zip NAME.zip model.onnx)",
    "size": f"an ONNX file of at most {MAX_BYTES >> 20} MiB",
    "format": "an ONNX graph",
    "one file": "all weights inside the ONNX file",
    "versions": f"operators of ONNX alone, set {MAX_OPSET} at most, and IR version {MAX_IR} at most (onnxruntime 1.8)",
    "nodes": f"at least {MIN_NODES}",
    "weights": "no floats but float32, and no initializer of less than 4 bytes an element",
    "normalisation": f"outside the graph: no Sub with a Mul or Div, by type or by name, among the first {NORMALISING_NODES} nodes",
    "opens": "a graph that onnxruntime opens",
    "input": f"one, float32 [*, {', '.join(map(str, _SHAPE))}], the batch size dynamic",
    "output": "exactly one",
    **{f"batch {batch}": f"[{batch}, D] float32, all finite" for batch in BATCHES},
    "embedding size": f"at most {MAX_EMBEDDING_SIZE}, equal in every batch",
}


@dataclass(frozen=True)
class RuleResult:
    """One rule and how the package stands to it."""

    rule: str  # one of EXPECTED
    expected: str
    found: str
    ok: bool


class _Stop(Exception):
    """What the rules below need is not there."""


def check_package(path: str | Path) -> list[RuleResult]:
    """Check a submission, ``NAME.zip``, or the ``NAME.onnx`` that is to become one (then without the rule ``package``).

    Every rule has a result, in the order of ``EXPECTED``; one that can't be checked because another failed counts as failed. The package
    may be submitted when all are ok. Takes about twice the memory of the model, and of a zip its size in temporary files.
    Raises: EvalError when there is no such file, or it has another suffix.
    """
    path = Path(path)
    if path.suffix not in (".zip", ".onnx"):
        raise EvalError(f"{path}: expected a submission, NAME.zip, or the NAME.onnx for it")
    if not path.is_file():
        raise EvalError(f"{path}: no such file")
    found: dict[str, tuple[bool, str]] = {}
    with tempfile.TemporaryDirectory(prefix="mfr-package-") as folder:
        try:
            if path.suffix == ".zip":
                _check_zip(path, Path(folder) / "model.onnx", found)
                path = Path(folder) / "model.onnx"
            _check_model(path, found)
        except _Stop:
            pass
    rules = [rule for rule in EXPECTED if rule != "package" or rule in found]
    failed = next((rule for rule in rules if rule in found and not found[rule][0]), None)
    results = {rule: found.get(rule, (False, f"not checked: see {failed}")) for rule in rules}
    return [RuleResult(rule, EXPECTED[rule], text, ok) for rule, (ok, text) in results.items()]


def _check_zip(path: Path, model: Path, found: dict[str, tuple[bool, str]]) -> None:
    """Unpack the one file of the zip to ``model``, whatever the zip calls it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(members) != 1 or not _is_plain_onnx(members[0]):
                found["package"] = (False, f"{len(names)} files: {', '.join(map(repr, names[:4]))}{', ...' if len(names) > 4 else ''}")
                raise _Stop
            if members[0].file_size > MAX_BYTES:
                found["package"] = (True, names[0])
                found["size"] = (False, f"{_mib(members[0].file_size)}, says the zip; it was not unpacked")
                raise _Stop
            with archive.open(members[0]) as source, model.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)  # ends at the stated size, whatever the data say
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        found["package"] = (False, f"not readable as a zip: {error}")
        raise _Stop from error
    found["package"] = (True, names[0])


def _is_plain_onnx(member: zipfile.ZipInfo) -> bool:
    """A regular file NAME.onnx at the root, stored or deflated: other methods unpack whole blocks of any size at once."""
    plain_name = member.filename.endswith(".onnx") and not set("/\\\0") & set(member.orig_filename)
    kind = stat.S_IFMT(member.external_attr >> 16)
    return plain_name and kind in (0, stat.S_IFREG) and member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def _check_model(path: Path, found: dict[str, tuple[bool, str]]) -> None:
    size = path.stat().st_size
    found["size"] = (size <= MAX_BYTES, _mib(size))
    if size > MAX_BYTES:
        raise _Stop
    if not _check_graph(path, found):
        raise _Stop
    _check_runs(path, found)


def _check_graph(path: Path, found: dict[str, tuple[bool, str]]) -> bool:
    """What the file says, without running it. Returns whether it may be run: its weights do not lie elsewhere on this machine."""
    try:
        model = onnx.load(str(path), load_external_data=False)
        outside = [tensor.name for tensor, _ in tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL]
        if not outside:
            onnx.checker.check_model(str(path))  # it would look for those files
    except Exception as error:  # protobuf's, the checker's and the operating system's errors share no narrower base class
        found["format"] = (False, _first_line(error))
        return False
    graph = model.graph
    found["format"] = (True, f"{len(graph.node)} nodes, {len(graph.initializer)} initializers")
    found["one file"] = (not outside, f"{len(outside)} tensors lie elsewhere, the first is {outside[0]!r}" if outside else "none elsewhere")

    sets = {each.domain or "ai.onnx": each.version for each in model.opset_import}
    known = set(sets) <= {"ai.onnx"} and not model.functions and sets.get("ai.onnx", 0) <= MAX_OPSET and model.ir_version <= MAX_IR
    functions = f", {len(model.functions)} functions of its own" if model.functions else ""
    found["versions"] = (known, f"{', '.join(f'{name} {version}' for name, version in sets.items())}, IR {model.ir_version}{functions}")

    found["nodes"] = (len(graph.node) >= MIN_NODES, str(len(graph.node)))
    wrong = [tensor for tensor, stored in tensors(model) if not _is_permitted(tensor, stored)]
    kinds = sorted({onnx.TensorProto.DataType.Name(tensor.data_type).lower() for tensor in wrong})
    found["weights"] = (not wrong, f"{len(wrong)} are {', '.join(kinds)}, the first is {wrong[0].name!r}" if wrong else "none")

    names = [node.name for node in graph.node[:NORMALISING_NODES]]
    subtracts = [name for name in names if name.startswith(("Sub", "_minus"))]
    scales = [name for name in names if name.startswith(("Mul", "_mul"))]
    if subtracts and scales:
        found["normalisation"] = (False, f"nodes named {subtracts[0]!r} and {scales[0]!r}: the server would feed it 0..255")
    elif normalises_itself(graph):
        found["normalisation"] = (False, "a Sub and after it a Mul or Div: the graph would normalise what the server has normalised")
    else:
        found["normalisation"] = (True, "outside: the server feeds (x - 127.5) / 127.5")
    return not outside


def _is_permitted(tensor: onnx.TensorProto, stored: bool) -> bool:
    """Floats are float32, in constants among the nodes too; of an initializer, any other element has 4 bytes or more."""
    if tensor.data_type in _FLOATS:
        return tensor.data_type == onnx.TensorProto.FLOAT
    return not stored or onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize >= 4


def _check_runs(path: Path, found: dict[str, tuple[bool, str]]) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it reports is in the exception too
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no narrower base class
        found["opens"] = (False, _first_line(error))
        raise _Stop from error
    found["opens"] = (True, f"opened by onnxruntime {onnxruntime.__version__} on the CPU")

    inputs, outputs = session.get_inputs(), session.get_outputs()
    fits = len(inputs) == 1 and inputs[0].type == "tensor(float)" and _fits(inputs[0].shape)
    found["input"] = (fits, _described(inputs))
    found["output"] = (len(outputs) == 1, _described(outputs))
    if not fits or len(outputs) != 1:
        raise _Stop

    sizes = {batch: _run_batch(session, inputs[0].name, batch, found) for batch in BATCHES}
    known = sorted({size for size in sizes.values() if size is not None})
    if known:
        complete = len(known) == 1 and None not in sizes.values()
        found["embedding size"] = (complete and 0 < known[0] <= MAX_EMBEDDING_SIZE, " and ".join(map(str, known)))


def _fits(shape: Sequence[int | str | None]) -> bool:
    return len(shape) == 4 and shape[1:] == _SHAPE and not isinstance(shape[0], int)


def _run_batch(session: onnxruntime.InferenceSession, name: str, batch: int, found: dict[str, tuple[bool, str]]) -> int | None:
    """Feed noise, normalised as the server would. Returns D, if there is one."""
    noise = np.random.default_rng(batch).integers(0, 256, (batch, *_SHAPE)).astype(np.float32)
    try:
        (embeddings,) = session.run(None, {name: (noise - 127.5) / 127.5})
    except Exception as error:  # as above
        found[f"batch {batch}"] = (False, _first_line(error))
        return None
    if not isinstance(embeddings, np.ndarray) or embeddings.ndim != 2 or len(embeddings) != batch or embeddings.dtype != np.float32:
        found[f"batch {batch}"] = (False, f"{getattr(embeddings, 'dtype', type(embeddings).__name__)} {list(np.shape(embeddings))}")
        return None
    bad = int(np.count_nonzero(~np.isfinite(embeddings).all(axis=1)))
    found[f"batch {batch}"] = (not bad, f"{bad} of {batch} embeddings are not finite" if bad else f"float32 {list(embeddings.shape)}")
    return embeddings.shape[1]


def _described(values: Sequence[onnxruntime.NodeArg]) -> str:
    return "; ".join(f"{each.name}: {each.type} {each.shape}" for each in values) or "none"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
