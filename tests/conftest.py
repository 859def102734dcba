"""Fixtures of the whole suite."""

from pathlib import Path

import pytest
import torch

_SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread, as in every rank, so that sums are taken in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def faces() -> Path:
    """Folder of the real faces; research data that is not part of the project."""
    if not (_SHARED_DATA / "lfw_112").is_dir():
        pytest.skip(f"the real-face data is not at {_SHARED_DATA}: accuracy and decoding on real faces were not checked")
    return _SHARED_DATA
