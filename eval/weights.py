"""Backbone weights, opened without executing anything of theirs: ``load_backbone``."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data_pipeline.names import is_plain_name
from eval.errors import EvalError
from model.vit import Vit, build_vit, preset_of

KINDS = "a run directory (its newest checkpoint), a .safetensors"  # what load_backbone opens, for messages


@dataclass(frozen=True)
class Backbone:
    """A network with loaded weights, float32 on the CPU."""

    net: Vit
    preset: str  # its name in model.vit.PRESETS
    file: Path  # that the weights were read from


def load_backbone(path: str | Path) -> Backbone:
    """Open backbone weights.

    Args:
        path: a ``.safetensors`` of backbone weights under the released key names (their shapes tell the preset), or a run directory, of
            which the newest committed checkpoint is taken.
    Raises: EvalError that names the file.
    """
    path = Path(path)
    if path.is_dir():
        weights = _latest_backbone(path)
    elif path.suffix == ".safetensors":
        weights = path
    else:
        raise EvalError(f"{path}: unknown kind of model; give {KINDS} or an .onnx file (pickles are never opened)")
    return _load_safetensors(weights)


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


def _load_safetensors(path: Path) -> Backbone:
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
    return Backbone(net, name, path)
