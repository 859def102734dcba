"""What is DALI's own about the reader backend: the index it needs, and the errors that it cannot name."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def

from data_pipeline.errors import DataError
from data_pipeline.loader import FaceLoader
from data_pipeline.pack import pack
from data_pipeline.shard_set import open_set
from tests.unit.loading import ALL, PLAIN, numbered_set, take
from tests.unit.record_sets import jpeg, write_records


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def stored_labels(shards, index):
    return fn.readers.mxnet(path=shards, index_path=[index])[1]


@pytest.mark.parametrize("keep", [[0, 1, 8, 9], [8, 9, 10, 11], [0, 5, 11], [11], [4, 5, 6]])
def test_reader_indexes_may_leave_out_shards_and_end_anywhere(tmp_path, keep):
    """DALI finds the wrong file when an index skips a shard, or ends with a lone record in the last one."""
    faces = open_set(numbered_set(tmp_path, 3, images=12))
    shards = faces.write_reader_index(tmp_path / "kept.idx", np.isin(np.arange(12), keep))
    assert shards == sorted({faces.shards[i // 4] for i in keep})
    pipeline = stored_labels([str(shard) for shard in shards], str(tmp_path / "kept.idx"))
    found = [int(np.array(pipeline.run()[0][0])[0]) for _ in keep]
    assert found == faces.labels[keep].tolist()


def test_a_label_out_of_range_in_a_packed_set_stops_the_batch(packed_people, tmp_path):
    pack([packed_people.parent / "src"], tmp_path / "set", 1)
    shard = tmp_path / "set" / "shard_00000.rec"
    body = bytearray(shard.read_bytes())
    body[12:16] = np.float32(17).tobytes()
    shard.write_bytes(body)
    with pytest.raises(
        DataError, match=r"set: rank 0, step \d: shard_00000\.rec offset 0 \(key 0\): label 17, expected .* in \[0, 6\): .*verify"
    ):
        take(FaceLoader(tmp_path / "set", 4, backend="reader", num_threads=1), 7)


@pytest.mark.parametrize("kind", ["image bytes", "magic"])
def test_a_record_that_dali_cannot_read_is_reported_with_set_rank_step_and_remedy(packed_people, tmp_path, kind):
    pack([packed_people.parent / "src"], tmp_path / "set", 1)
    shard = tmp_path / "set" / "shard_00000.rec"
    body = bytearray(shard.read_bytes())
    at = 0 if kind == "magic" else 8 + 24
    body[at : at + 200] = b"\x55" * 200 if kind != "magic" else body[1:201]
    shard.write_bytes(body)
    with pytest.raises(
        DataError,
        match=r"set: rank 1, step \d+, or one of the next few.*python -m data_pipeline verify .*set` names it: copy its shard again",
    ):
        take(FaceLoader(tmp_path / "set", 4, rank=1, world_size=2, augment=PLAIN, backend="reader", num_threads=1), 8)


@pytest.mark.parametrize("augment", [PLAIN, ALL])
def test_an_image_of_another_size_is_refused(tmp_path, augment):
    write_records(tmp_path / "train.rec", [(key, 0.0, jpeg(side=112 if key else 128)) for key in range(4)])
    with pytest.raises(DataError, match=r"rank 0, step 1: train\.rec offset 0 \(key 0\): an image of 128x128 pixels, expected 112x112"):
        next(FaceLoader(tmp_path, 4, augment=augment, backend="reader", num_threads=1))


def test_the_state_of_another_rank_or_number_of_ranks_is_refused(packed_people):
    """DALI would take it without a word."""
    state = FaceLoader(packed_people, 2, backend="reader").state()
    for change, complaint in (
        ({"world_size": 2, "global_batch_size": 4}, "global_batch_size: 2 in the state, 4 here; world_size: 1 in the state, 2 here"),
        (
            {"rank": 1, "world_size": 2, "batch_size": 1, "global_batch_size": 2},
            "batch_size: 2 in the state, 1 here; rank: 0 in the state, 1",
        ),
    ):
        with pytest.raises(DataError, match=complaint):
            FaceLoader(packed_people, **{"batch_size": 2, **change}, backend="reader", state=state)
    with pytest.raises(DataError, match=r"backend: 'reader' in the state, 'table' here"):
        FaceLoader(packed_people, 2, state=state)


CRASH = """
import sys
from data_pipeline.errors import DataError
from data_pipeline.loader import FaceLoader

for backend in ("table", "reader"):
    loader = FaceLoader(sys.argv[1], 128, backend=backend, num_threads=2, say=lambda _: None)
    try:
        for _ in range(3):
            next(loader)
        print("read", len(loader.bad_records))
    except DataError as error:
        print("error", error)
"""


def test_an_image_without_a_header_does_not_crash_the_process(tmp_path):
    """In a batch of more than eight it does, where DALI's decoder meets it first."""
    records = [(key, 0.0, jpeg(mark=key)) for key in range(256)]
    records[40] = (40, 0.0, records[40][2][:100])
    write_records(tmp_path / "train.rec", records)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"read 1\nerror .*names it: copy its shard again.*\n", done.stdout)
