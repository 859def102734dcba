"""Fixtures of the whole suite."""

import signal
from pathlib import Path

import pytest
import torch

_SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread, as in every rank, so that sums are taken in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard():
    """A job that a script puts into the background ignores Ctrl-C, and all that it starts would: then nothing could be tested of it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def faces() -> Path:
    """Folder of the real faces; research data that is not part of the project."""
    if not (_SHARED_DATA / "lfw_112").is_dir():
        pytest.skip(f"the real-face data is not at {_SHARED_DATA}: accuracy and decoding on real faces were not checked")
    return _SHARED_DATA
