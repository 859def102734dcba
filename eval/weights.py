"""Backbone weights, opened without executing anything of theirs: ``load_backbone``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.names import is_plain_name
from eval.errors import EvalError
from eval.release_folder import check_release, is_release
from eval.torch_file import read_torch_file
from model.vit import COUNTERS, Vit, build_vit, preset_of
from train.checkpoint_folder import BACKBONE, BACKBONE_EMA, POINTER

KINDS = "a run directory (its newest checkpoint), a release, a .safetensors, a .pt or .pth"  # what load_backbone opens, for messages
SUFFIXES = (".safetensors", ".pt", ".pth")  # of its files

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Backbone:
    """A network with loaded weights, float32 on the CPU."""

    net: Vit
    preset: str  # its name in model.vit.PRESETS
    file: Path  # that the weights were read from
    note: str = ""  # for people: what was unwrapped to get at them, "" if nothing


def load_backbone(path: str | Path, *, ema: bool = False) -> Backbone:
    """Open backbone weights.

    Args:
        path: weights under the released key names, whose shapes tell the preset: a ``.safetensors``, or a ``.pt`` or ``.pth`` as
            ``eval.torch_file`` reads them; a release (see ``eval.release``), of which every file is checked; or a run directory, of which
            the newest committed checkpoint is taken. float16, bfloat16 and float64 become float32.
        ema: of a run, the mean weights (``model.ema_decay``) instead of the last ones.
    Raises: EvalError that names the file.
    """
    path = Path(path)
    if not path.exists():
        raise EvalError(f"{path}: no such model; give {KINDS}")
    if ema and (not path.is_dir() or is_release(path)):
        raise EvalError(f"{path}: --ema chooses among the two weights of a run, and this is no run directory")
    if is_release(path):
        check_release(path)
        return _load(path / BACKBONE)
    return _load(_latest_backbone(path, BACKBONE_EMA if ema else BACKBONE) if path.is_dir() else path)


def _latest_backbone(run: Path, name: str) -> Path:
    pointer = run / "checkpoints" / POINTER
    if (run / name).is_file():
        raise EvalError(f"{run}: no run directory; for the weights in it give {run / name}")
    if not pointer.is_file():
        raise EvalError(f"{run}: a run with no complete checkpoint ({pointer} is missing); train until one is written, or name another run")
    refuse_outside(pointer, pointer.parent)
    checkpoint = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not is_plain_name(checkpoint):
        raise EvalError(f"{pointer}: expected the name of a folder beside it, found {checkpoint!r:.80}")
    weights = pointer.parent / checkpoint / name
    if not weights.is_file() and name == BACKBONE_EMA:
        raise EvalError(f"{run}: holds no mean weights ({pointer} names {checkpoint}, which holds no {name}); train with model.ema_decay")
    if not weights.is_file():
        raise EvalError(f"{run}: a run with no complete checkpoint ({pointer} names {checkpoint}, which holds no {name})")
    refuse_outside(weights, pointer.parent)
    return weights


def refuse_outside(path: Path, folder: Path) -> None:
    """A run may come from a stranger: its links must not choose which files of this machine are opened."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise EvalError(f"{path}: leads out of {folder}, to {path.resolve()}; copy it there, or give a .safetensors file")


def _load(path: Path) -> Backbone:
    stated, note = {}, ""  # what the file itself says of its weights
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                stated = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a safetensors handle is not iterable)
        except SafetensorError as error:
            raise EvalError(f"{path}: not a readable safetensors file: {error}") from error
    elif path.suffix in (".pt", ".pth"):
        state, note = read_torch_file(path)
    else:
        raise EvalError(f"{path}: unknown kind of model; give {KINDS}")
    try:
        preset = preset_of(state)
    except ValueError as error:
        raise EvalError(f"{path}: {error}") from error
    if stated.get("preset", preset) != preset:
        raise EvalError(f"{path}: metadata names the preset {stated['preset']}, but the weights have the shapes of {preset}")
    with torch.device("meta"):  # no time and memory for weights that are replaced at once
        net = build_vit(preset, embedding_size=len(state["feature.2.weight"]))
    net.load_state_dict(_as_float32(state, path), assign=True)
    return Backbone(net, preset, path, note)


def _as_float32(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Copies, independent of the file. Raises: EvalError for a tensor that holds no finite numbers one by one."""
    copies = {}
    for key, value in state.items():
        counter = key in COUNTERS
        if value.layout != torch.strided or value.is_quantized or (value.dtype not in _DTYPES and not (counter and value.numel() == 1)):
            raise EvalError(f"{path}: {key}: expected float32, float16, bfloat16 or float64, found {value.dtype} ({value.layout})")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():  # a small file could ask for any amount of memory
            raise EvalError(f"{path}: {key}: stores fewer numbers than its shape {list(value.shape)} has")
        copies[key] = value.reshape(()).long() if counter else value.to(torch.float32, copy=True).contiguous()
        if not counter and not copies[key].isfinite().all():
            raise EvalError(f"{path}: {key}: holds numbers that are not finite")
    return copies
