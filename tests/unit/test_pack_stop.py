"""``python -m data_pipeline pack`` as a user starts it, stopped in the middle. A named pipe among the images holds it up there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.pack import pack
from data_pipeline.recordio import RecordReader
from tests.unit.processes import ROOT, children, gone, wait_until
from tests.unit.record_sets import commented, jpeg

SHARDS = 6


@pytest.fixture
def source(tmp_path):
    """240 images of 4 identities; ``whole`` beside it is what an uninterrupted pack makes of them."""
    plain = jpeg()
    for k in range(240):
        (tmp_path / f"src/{k % 4}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"src/{k % 4}/{k:03d}.jpg").write_bytes(commented(plain, b"%d" % k))
    pack([tmp_path / "src"], tmp_path / "whole", SHARDS)
    return tmp_path / "src"


@pytest.fixture
def held(source, tmp_path):
    """A pack by two workers that has finished all shards but the third, where one of the images is a pipe. (process, mend the source)"""
    image = list(RecordReader(tmp_path / "whole/shard_00002.rec"))[7].image
    (path,) = [path for path in source.glob("*/*") if path.read_bytes() == image]
    path.unlink()
    os.mkfifo(path)
    process = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline", "pack", source, tmp_path / "set", "--shards", str(SHARDS), "--workers", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job, as this suite may be, ignores it
    )
    wait_until(lambda: len(list(tmp_path.glob(".set.packing/shard_*.json"))) == SHARDS - 1, process)

    def mend():
        path.unlink()
        path.write_bytes(image)

    yield process, mend
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def written(folder):
    return {shard.name: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in folder.glob("*.rec")}


def is_writing(pid):
    return any(os.readlink(file).endswith(".part") for file in Path(f"/proc/{pid}/fd").iterdir())


GOES_ON = "the same command goes on from what is finished in "


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("kill -9 of all", -9, None),
        ("kill -9 of the parent", -9, None),
        ("kill -9 of a worker", 2, "error: a worker process died (exit code -9"),
        ("Ctrl-C", 130, "interrupted: " + GOES_ON),
        ("SIGTERM", 143, "stopped: " + GOES_ON),
    ],
)
def test_a_pack_that_was_stopped_goes_on_and_makes_the_same_bytes(source, held, tmp_path, how, code, message):
    process, mend = held
    workers = children(process.pid, "spawn_main")
    assert len(workers) == 2
    with pytest.raises(DataError, match="set: another process is packing it"):
        pack([source], tmp_path / "set", SHARDS)
    if how == "kill -9 of all":
        os.killpg(process.pid, signal.SIGKILL)
    elif how == "kill -9 of the parent":
        process.kill()
    elif how == "kill -9 of a worker":
        os.kill(next(pid for pid in workers if is_writing(pid)), signal.SIGKILL)  # the other one is out of work
    elif how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    if message:
        assert len([line for line in errors.splitlines() if line.startswith(message)]) == 1
        assert GOES_ON + str(tmp_path / ".set.packing") in errors
        assert not list(tmp_path.glob(".set.packing/*.part"))
    wait_until(lambda: all(map(gone, workers)))
    assert not (tmp_path / "set").exists()
    finished = written(tmp_path / ".set.packing/set")
    assert sorted(finished) == [f"shard_0000{i}.rec" for i in (0, 1, 3, 4, 5)]
    mend()
    pack([source], tmp_path / "set", SHARDS)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert finished.items() <= written(tmp_path / "set").items()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["set", "src", "whole"]
