"""The random number generators of a rank: seeded, saved, restored."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Give this rank generators of its own, from which it draws dropped patches and paths. ``step``: where the run stands."""
    numbers = np.random.SeedSequence([seed, rank, step]).generate_state(2, np.uint64)
    torch.manual_seed(int(numbers[0]))
    random.seed(int(numbers[1]))
    np.random.seed(int(numbers[1]) % 2**32)


def random_state(device: torch.device) -> dict[str, Any]:
    """Of every generator a step may draw from: torch's on the CPU and on ``device``, Python's, numpy's; for torch.save, weights_only."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest)}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Take over :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
