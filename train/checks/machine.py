"""One node: its GPUs, shared memory, limits, ports and disk."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.info import readable
from train.checks.finding import Finding, ok, problem, warning

_QUERY = ("index", "name", "driver_version", "compute_cap", "memory.total", "memory.used")
_USED_MIB = 2048  # of a GPU's memory before the run: more than the contexts of the ranks that check it
_BFLOAT16 = 8.0  # compute capability from which on GPUs multiply bfloat16
_SHARED_MEMORY = 1 << 30  # bytes that NVIDIA asks containers to have for NCCL
_FILES_OF_A_RANK = 256  # libraries, logs, pipes, the exporter's connections, a checkpoint
_SOCKETS_TO_A_RANK = 16  # connections between two ranks: gloo has one for every group of ranks and pair
_SLOW_DISK = 50e6  # bytes/s; the checkpoint of a vit_l with AdamW's moments, 3.6 GB, takes over a minute
_BLOCK = 1 << 22


@dataclass(frozen=True)
class TorchDevices:
    """What torch makes of the machine."""

    count: int  # GPUs that it can use
    build: str | None  # CUDA version that it was built for; None: a CPU build
    kept_off: bool = False  # DS_ACCELERATOR=cpu

    @classmethod
    def here(cls) -> TorchDevices:
        import torch

        return cls(torch.cuda.device_count(), torch.version.cuda, os.environ.get("DS_ACCELERATOR") == "cpu")


def gpus(torch_devices: TorchDevices, ranks_here: int) -> Iterator[Finding]:
    """Compare what nvidia-smi tells with what torch can use. ``ranks_here``: on this node, each of which needs a GPU of its own."""
    smi = shutil.which("nvidia-smi")
    if smi is None and not torch_devices.count:
        yield ok("gpu", "none here (no nvidia-smi): ranks compute on the CPU")
        return
    if smi is None:
        yield warning(
            "gpu", f"torch sees {torch_devices.count}, but there is no nvidia-smi to tell of them", "install the driver's utilities"
        )
        return
    asked = subprocess.run(
        [smi, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        said = (asked.stdout + asked.stderr).strip().partition("\n")[0]
        yield problem("gpu", f"nvidia-smi fails: {said}", "reload or reinstall the driver; in a container, start it with --gpus all")
        return
    rows = [dict(zip(_QUERY, map(str.strip, line.split(",")), strict=True)) for line in asked.stdout.splitlines() if line.strip()]
    yield from map(_gpu, rows)
    if not rows:
        return
    driver, build = rows[0]["driver_version"], torch_devices.build
    if torch_devices.kept_off:
        yield warning("gpu", f"DS_ACCELERATOR=cpu keeps ranks off {len(rows)} GPUs", "unset DS_ACCELERATOR")
    elif build is None:
        yield problem(
            "gpu", f"torch is a CPU build and cannot use {len(rows)} GPUs", "install the CUDA build: pip install -r requirements.txt"
        )
    elif not torch_devices.count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        cure = f"update the driver to one for CUDA {build}, or correct CUDA_VISIBLE_DEVICES ({visible})"
        yield problem("gpu", f"torch for CUDA {build} can use none of {len(rows)} GPUs under driver {driver}", cure)
    elif ranks_here > torch_devices.count:
        yield problem("gpu", f"{ranks_here} ranks share {torch_devices.count} GPUs", f"start {torch_devices.count} ranks on this node")
    else:
        yield ok("gpu", f"torch for CUDA {build} can use {torch_devices.count}, driver {driver}")


def _gpu(row: dict[str, str]) -> Finding:
    found = f"{row['index']}: {row['name']}, {row['memory.total']} MiB, {row['memory.used']} in use"
    if row["memory.used"].isdecimal() and int(row["memory.used"]) > _USED_MIB:
        return warning("gpu", f"{found}: another process has it", "end that (nvidia-smi names it), or keep off by CUDA_VISIBLE_DEVICES")
    if float(row["compute_cap"]) < _BFLOAT16:
        return warning("gpu", f"{found}; it has no bfloat16 (compute capability {row['compute_cap']})", "use an fp16 file of ds_configs/")
    return ok("gpu", found)


def shared_memory(folder: Path, ranks_here: int, on_gpu: bool) -> Finding:
    """Ranks of a node exchange through it under NCCL; containers have 64 MiB by default."""
    cure = "docker run --shm-size=1g, in Kubernetes an emptyDir of medium Memory at /dev/shm"
    complain = problem if on_gpu and ranks_here > 1 else warning
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return complain("shared memory", f"{folder} cannot be used ({error.strerror})", cure)
    found = f"{folder} has {readable(usage.free)} free of {readable(usage.total)}"
    if usage.free < _SHARED_MEMORY:
        return complain("shared memory", f"{found}; NCCL's ranks want {readable(_SHARED_MEMORY)}", cure)
    return ok("shared memory", found)


def open_files(world_size: int, shards: int = 0) -> Finding:
    """The limit of a process against an estimate of what a rank opens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_OF_A_RANK + shards + _SOCKETS_TO_A_RANK * (world_size - 1)
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = "there is no hard limit" if hard == resource.RLIM_INFINITY else f"the hard limit is {hard:,}"
        return problem("open files", f"the limit is {soft:,}; a rank may need {needed:,}", f"ulimit -n {max(needed, 65536)} ({allowed})")
    return ok("open files", f"the limit is {'infinite' if soft == resource.RLIM_INFINITY else f'{soft:,}'}; a rank may need {needed:,}")


def ports(host: str, first: int, ranks_here: int) -> Finding:
    """Whether each rank of this node could listen where its metrics are expected."""
    if not first:
        return ok("ports", "metrics.port is 0: no exporter")
    wanted, taken = range(first, first + ranks_here), []
    for port in wanted:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the exporter does: a port in TIME_WAIT is free
            try:
                trial.bind((host, port))
            except OverflowError:
                return problem("ports", f"{port} is no port: metrics.port + local_rank goes beyond 65535", "choose a smaller metrics.port")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    return problem(
                        "ports", f"cannot listen on {host}:{port}: {error.strerror}", "choose another metrics.host or metrics.port"
                    )
                taken.append(port)
    span = f"{host}:{wanted[0]}" + (f" to {wanted[-1]}" if ranks_here > 1 else "")
    if taken:
        found = f"{', '.join(map(str, taken))} of {span} taken: those exporters would move on to other ports"
        return warning("ports", found, "end what listens there (ss -ltnp), or choose another metrics.port")
    return ok("ports", f"metrics ports {span} are free")


def disk(folder: Path, mib: int) -> Finding:
    """Write ``mib`` MiB down to the disk in ``folder`` and read them back; where it does not exist yet, in the nearest folder above it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    cure = "choose another output, or make this one writable and free space on it"
    size, block = mib << 20, os.urandom(_BLOCK)
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder, prefix=".doctor-") as file:
            begin = time.perf_counter()
            for start in range(0, size, _BLOCK):
                file.write(block[: size - start])
            file.flush()
            os.fsync(file.fileno())
            write = size / (time.perf_counter() - begin)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else reading would be from memory
            file.seek(0)
            begin = time.perf_counter()
            for start in range(0, size, _BLOCK):
                if file.read(_BLOCK) != block[: size - start]:
                    return problem("disk", f"{folder} gave back other bytes than were written", "replace the disk, or look at its server")
            read = size / (time.perf_counter() - begin)
    except OSError as error:
        return problem("disk", f"{folder}: {mib} MiB cannot be written ({error.strerror})", cure)
    found = f"{folder}: writes {readable(write)}/s, reads {readable(read)}/s ({mib} MiB), {readable(free)} free"
    if write < _SLOW_DISK:
        return warning("disk", f"{found}; checkpoints will be slow", "choose an output on a faster disk")
    return ok("disk", found)
