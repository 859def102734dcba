"""Packages, compilers and what compiling leaves behind. Imports torch and DALI in the checks that need them: they may be missing."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from train.checks.finding import Finding, ok, problem, warning

_OLDEST_PYTHON = (3, 11)
_TOLD = ("torch", "deepspeed", "nvidia-dali")  # packages whose versions are worth a word where all is well
_COMPILE_LIMIT_S = 600  # no compilation of an op takes longer
_LEVELS = 8  # of 255, by which decoders may differ: they round differently; a wrong image differs by tens


def python() -> Finding:
    found = f"{'.'.join(map(str, sys.version_info[:3]))} in {sys.prefix}"
    if sys.version_info < _OLDEST_PYTHON:
        return problem("python", found, f"make the environment anew with Python {'.'.join(map(str, _OLDEST_PYTHON))} or later")
    return ok("python", found)


def packages(requirements: Path) -> Iterator[Finding]:
    """Compare what is installed with the pins of ``requirements``: a finding for each that differs, one for all that do not."""
    from packaging.requirements import Requirement

    lines = (line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    cure, agree = f"pip install -r {requirements.name}", {}
    for pin in map(Requirement, filter(None, lines)):
        try:
            installed = version(pin.name)
        except PackageNotFoundError:
            yield problem("packages", f"{pin.name} is not installed, {pin.specifier} is asked for", cure)
            continue
        if pin.specifier.contains(installed, prereleases=True):
            agree[pin.name] = installed
        else:
            yield warning("packages", f"{pin.name} is {installed}, tested is {pin.specifier}", cure)
    told = {name: installed for name, installed in agree.items() if name.startswith(_TOLD)}
    names = [f"{name} {installed}" for name, installed in told.items()]
    yield ok("packages", ", ".join([*names, f"{len(agree) - len(told)} others as pinned"]))


def apex(needed: bool) -> Finding:
    """NVIDIA's apex, the package of that name on PyPI, or none. ``needed``: the recipe says ``optimizer.impl: apex``."""
    other = "set optimizer.impl=torch, or use NVIDIA's container, or build https://github.com/NVIDIA/apex with --cpp_ext --cuda_ext"
    if find_spec("apex") is None:
        if needed:
            return problem("apex", "not installed, and the recipe says optimizer.impl: apex", other)
        return ok("apex", "not installed; nothing needs it but optimizer.impl=apex")
    # In a process of its own: extensions that were built for another torch may crash it.
    trial = subprocess.run(
        [sys.executable, "-c", "import torch, amp_C; from apex.optimizers import FusedAdam"], capture_output=True, text=True, check=False
    )
    if trial.returncode == 0:
        return ok("apex", "NVIDIA's, with its CUDA extensions")
    lines = trial.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"exit code {trial.returncode}"
    found = f"not NVIDIA's with its CUDA extensions, but another package of that name or a build without them ({reason})"
    return problem("apex", found, f"pip uninstall apex; {other}") if needed else warning("apex", found, f"pip uninstall apex; then {other}")


def dali(device_id: int | None) -> Finding:
    """Decode a JPEG with the loader's own graph, on the CPU or on GPU ``device_id``, and compare it with Pillow's."""
    where = "the CPU" if device_id is None else f"GPU {device_id}"
    try:
        difference = _decoding_difference(device_id)
    except ImportError as error:
        return problem(
            "dali", f"cannot be imported ({error})", "pip install -r requirements.txt; nvidia-dali without -cudaNNN is a placeholder"
        )
    except RuntimeError as error:
        return problem(
            "dali", f"does not decode on {where}: {_first_line(error)}", "does its CUDA version suit the driver? See the gpu lines"
        )
    if difference > _LEVELS:
        cure = "reinstall nvidia-dali-cuda130; try data.decode.device=cpu on a GPU"
        return problem("dali", f"on {where} a test image differs from Pillow's by {difference} levels of 255", cure)
    return ok("dali", f"decodes on {where}; a test image differs from Pillow's by {difference} levels of 255")


def _decoding_difference(device_id: int | None) -> int:
    """The largest difference of a pixel of a smooth image, [112, 112, 3] uint8, in levels."""
    import numpy as np
    import torch
    from nvidia.dali import pipeline_def
    from PIL import Image

    from data_pipeline import SIDE, graph

    ramp = np.linspace(0, 255, SIDE, dtype=np.float32)
    image = np.stack([*np.broadcast_arrays(ramp[:, None], ramp[None, :]), np.full((SIDE, SIDE), 128)], axis=2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)

    @pipeline_def(batch_size=1, num_threads=1, device_id=device_id)
    def pipeline():
        return graph.decoded(graph.fed(["encoded"])["encoded"], graph.Decode())

    decoder = pipeline()
    decoder.build()
    graph.feed_images(decoder, [memoryview(np.frombuffer(file.getvalue(), np.uint8))])
    device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
    (images,) = graph.run(decoder, device)
    found = graph.tensor(images)[0].cpu().numpy().astype(int)
    return int(np.abs(found - np.asarray(Image.open(file), int)).max())


def compiler(needed_by: Sequence[str]) -> Finding:
    """Compile a line against Python's headers. ``needed_by``: what in the recipe compiles at start."""
    cure = "apt-get install g++ python3-dev (CXX names another compiler)"
    complain = problem if needed_by else warning
    who = ", ".join(needed_by) or "model.compile=true and optimizer.impl=deepspeed, and nothing else"
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if name is None or shutil.which(name) is None:
        return complain("compiler", f"no C++ compiler ({name or 'c++, g++, clang++'} not found), which {who} would use", cure)
    command = [name, "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-"]
    trial = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, check=False)
    if trial.returncode:
        return complain(
            "compiler", f"{name} does not compile against Python's headers ({_first_line(trial.stderr)}), which {who} would do", cure
        )
    return ok("compiler", f"{name} compiles against Python's headers")


def nvcc(needed: bool) -> Finding:
    """CUDA's compiler, on a machine with GPUs. ``needed``: the recipe says ``optimizer.impl: deepspeed``."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found:
        return ok("nvcc", found)
    if needed:
        cure = "install the CUDA toolkit of torch's CUDA version and set CUDA_HOME, or set optimizer.impl=torch"
        return problem("nvcc", "not found, and the recipe says optimizer.impl: deepspeed, which compiles its AdamW", cure)
    return ok("nvcc", "not found; nothing needs it but optimizer.impl=deepspeed")


def extensions_folder() -> Path:
    """Where torch compiles extensions, those of DeepSpeed among them."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def compile_locks(folder: Path, now: float | None = None) -> Iterator[Finding]:
    """Lock files that a killed compilation left in ``folder``: the next start that compiles waits for them for ever.

    A live one is held open by the process that compiles. One that no process here holds may be that of another host, if it is young.
    """
    locks = [path for pattern in ("*/lock", "*/*/lock") for path in sorted(folder.glob(pattern))]
    held = _open_files() if locks else set()
    for lock in locks:
        age = (time.time() if now is None else now) - lock.stat().st_mtime
        if str(lock.resolve()) in held:
            yield warning("compile locks", f"a process is compiling in {lock.parent}", "let it finish; a start would wait for it")
        elif age < _COMPILE_LIMIT_S:
            cure = f"if no other host compiles there: rm {lock}"
            yield warning("compile locks", f"{lock} is {age:.0f} s old, and no process of this host holds it", cure)
        else:
            found = f"{lock} was left behind {age / 3600:.1f} h ago: a start that compiles would wait for it for ever"
            yield problem("compile locks", found, f"rm {lock}")
    if not locks:
        yield ok("compile locks", f"none left behind in {folder}")


def _open_files() -> set[str]:
    """What the processes of this host have open, as far as this user may know."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(os.readlink(descriptor))
        except OSError:  # gone meanwhile, or someone else's
            continue
    return found


def _first_line(text: object) -> str:
    return next(iter(str(text).strip().splitlines()), "no reason given")
