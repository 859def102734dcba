"""GPUs as their data sheets describe them, for plans and for utilisation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One GPU. Operations are of dense matrix products, summed in float32; data sheets often print twice that, for sparse ones."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes/s of its memory
    flops: dict[str, float]  # operations/s by precision of the operands: bf16, fp16, fp32 (TF32 is not used here)
    link_bandwidth: float  # bytes/s that it sends to its neighbours in a node, one direction


def _gpu(name: str, memory_gib: int, bandwidth_tb: float, half: float, full: float, link_gb: float, *, bf16: bool = True) -> Accelerator:
    """``half``, ``full``: 1e12 operations/s of 16-bit tensor cores and of float32 outside of them."""
    flops = {"fp16": half * 1e12, "fp32": full * 1e12} | ({"bf16": half * 1e12} if bf16 else {})
    return Accelerator(name, memory_gib * 2**30, bandwidth_tb * 1e12, flops, link_gb * 1e9)


# NVIDIA's data sheets. Keys are what users type; torch's device names contain the names.
ACCELERATORS = {
    "b200": _gpu("B200", 180, 8.0, 2250, 75, 900),
    "h200": _gpu("H200", 141, 4.8, 989.4, 66.9, 450),
    "h100": _gpu("H100", 80, 3.35, 989.4, 66.9, 450),
    "a100-80": _gpu("A100-SXM4-80GB", 80, 2.04, 312, 19.5, 300),
    "a100-40": _gpu("A100-SXM4-40GB", 40, 1.56, 312, 19.5, 300),
    "l40s": _gpu("L40S", 48, 0.864, 362, 91.6, 32),
    "a6000": _gpu("RTX A6000", 48, 0.768, 154.8, 38.7, 32),
    "rtx4090": _gpu("RTX 4090", 24, 1.01, 165.2, 82.6, 32),
    "a10": _gpu("A10", 24, 0.6, 125, 31.2, 32),
    "l4": _gpu("L4", 24, 0.3, 121, 30.3, 32),
    "v100": _gpu("V100-SXM2-32GB", 32, 0.9, 125, 15.7, 150, bf16=False),
}


def accelerator_of(device_name: str) -> Accelerator | None:
    """The one whose name ``torch.cuda.get_device_name()`` contains, the longest if several; None if it is not known here."""
    found = [gpu for gpu in ACCELERATORS.values() if gpu.name in device_name]
    return max(found, key=lambda gpu: len(gpu.name), default=None)
