"""Weights that ``torch.save`` wrote (``.pt``, ``.pth``), read without executing anything of theirs: ``read_torch_file``.

Such a file is a pickle, and a pickle is a program that can run any command. Torch's ``weights_only`` unpickler builds tensors, containers
and plain values alone and refuses every global beyond those by name; there is no way round it here.
"""

import re
import warnings
import zipfile
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from eval.errors import EvalError

WRAPPERS = ("state_dict", "state_dict_backbone", "model_state_dict", "model", "backbone", "net")  # keys that checkpoints keep weights under


def read_torch_file(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a state_dict: bare, or beside other things under one of ``WRAPPERS``.

    A prefix that all keys share up to a dot, as ``module.``, is taken off.
    Returns: the tensors as they lie in the file, mapped from it where it is of torch 1.6 or later; what was unwrapped, for people, or "".
    Raises: EvalError that names the file, and the global when it asks for one.
    """
    content = _load(path)
    state, wrapper = content, ""
    if not _is_state_dict(content):
        named = [key for key in WRAPPERS if isinstance(content, dict) and _is_state_dict(content.get(key))]
        if len(named) != 1:
            raise EvalError(
                f"{path}: expected a state_dict (names and tensors), or a dictionary with one under {', '.join(WRAPPERS)}, found "
                + (f"several: {', '.join(named)}; save the one that counts in a file of its own" if named else _described(content))
            )
        state, wrapper = content[named[0]], named[0]
    odd = next((key for key in state if not key.isprintable()), None)
    if odd is not None:
        raise EvalError(f"{path}: {odd!r:.80} can't be the name of a weight")
    prefix = _common_prefix(state)
    notes = [f"under {wrapper}"] * bool(wrapper) + [f"without the prefix {prefix}"] * bool(prefix)
    return {key.removeprefix(prefix): value for key, value in state.items()}, ", ".join(notes)


def _load(path: Path) -> object:
    try:
        with warnings.catch_warnings(action="ignore"):  # of a TorchScript archive torch warns, and then raises
            # Files from before torch 1.6 are no archives and can't be mapped.
            return torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise EvalError(
                f"{path}: asks for {asked[1]:.100}, which no file of weights needs; it may be an attack, or hold a whole module. Nothing "
                "of it was executed; from a source that you trust, save the state_dict alone (torch.save(net.state_dict(), FILE))"
            ) from None
        if "TorchScript" in str(error):
            raise EvalError(
                f"{path}: a TorchScript archive, which is a program; expected a state_dict. Nothing of it was executed"
            ) from None
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip() and "documentation" not in line), "")
        raise EvalError(f"{path}: not a readable file of torch.save, {type(error).__name__}: {reason:.200}; copy it again") from None


def _common_prefix(keys: Iterable[str]) -> str:
    """The parts, each with its dot, with which all keys begin; what the first and the last in order share, all share."""
    first, last = (key.split(".")[:-1] for key in (min(keys), max(keys)))
    return "".join(f"{part}." for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())


def _described(content: object) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    keys = ", ".join(f"{str(key)!r:.40} ({type(value).__name__})" for key, value in list(content.items())[:8])
    return f"a dictionary of {len(content)} others: {keys}"
