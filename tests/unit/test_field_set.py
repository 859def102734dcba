"""Field sets of a size whose table is kept on the disk, and what their header record says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import field_set
from data_pipeline.errors import DataError
from data_pipeline.loader import FaceLoader
from data_pipeline.shard_set import open_set
from tests.unit.loading import take
from tests.unit.record_sets import field_records, jpeg, write_records

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def kept(monkeypatch):
    """Tables of sets of any size are kept."""
    monkeypatch.setattr(field_set, "_KEEP_FROM", 0)


def tables(folder):
    return sorted(path.name for path in folder.glob(".train.table-*") if path.is_dir())


def test_the_table_of_a_large_set_is_made_once_and_mapped_after(tmp_path, kept, monkeypatch):
    write_records(tmp_path / "train.rec", field_records([2, 0, 3]), shuffle=1)
    first = open_set(tmp_path)
    assert len(tables(tmp_path)) == 1
    monkeypatch.setattr(field_set, "_read_field", None)  # it must not be read again
    again = open_set(tmp_path)
    assert np.array_equal(again.records, first.records)
    assert (again.num_classes, again.other_records, again.digest) == (3, 4, first.digest)
    assert not again.records.flags.writeable
    assert isinstance(again.records.base, np.memmap)
    assert [batch.labels.tolist() for batch in take(FaceLoader(tmp_path, 5, seed=1, num_threads=1), 2)] == [
        batch.labels.tolist() for batch in take(FaceLoader(tmp_path / "train.rec", 5, seed=1, num_threads=1), 2)
    ]


def test_a_set_that_changed_gets_another_table(tmp_path, kept):
    write_records(tmp_path / "train.rec", field_records([2, 0, 3]))
    assert open_set(tmp_path).num_images == 5
    write_records(tmp_path / "train.rec", field_records([4, 1]))
    assert (open_set(tmp_path).num_images, open_set(tmp_path).num_classes) == (5, 2)
    assert len(tables(tmp_path)) == 2


def test_the_table_of_a_set_in_a_read_only_folder_lies_in_the_users_cache(tmp_path, kept, monkeypatch):
    (tmp_path / "set").mkdir()
    write_records(tmp_path / "set" / "train.rec", field_records([2, 3]))
    monkeypatch.setattr(field_set.os, "access", lambda path, mode: False)  # root may write everywhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_set(tmp_path / "set").num_images == 5
    assert len(tables(tmp_path / "cache" / "lvface-deepspeed")) == 1
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["train.idx", "train.rec"]


def test_processes_that_open_a_large_set_at_once_make_one_table(tmp_path):
    write_records(tmp_path / "train.rec", field_records([20, 0, 30]))
    script = (
        "import sys\nfrom data_pipeline import field_set\nfrom data_pipeline.shard_set import open_set\n"
        "field_set._KEEP_FROM = 0\nprint(open_set(sys.argv[1]).digest)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)
    ]
    digests = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert digests == {open_set(tmp_path).digest + "\n"}
    assert len(tables(tmp_path)) == 1


@pytest.mark.parametrize("place", ["first", "last"])
def test_the_header_record_counts_wherever_it_stands(tmp_path, place):
    """Files that were merged have it last. Its last class has no image, so that the labels alone would give one class less."""
    header, *rest = field_records([2, 3, 0])
    write_records(tmp_path / "train.rec", [header, *rest] if place == "first" else [*rest, header])
    faces = open_set(tmp_path)
    assert (faces.num_images, faces.num_classes, faces.other_records) == (5, 3, 4)
    assert faces.records["key"].tolist() == [1, 2, 3, 4, 5]


def test_keys_that_do_not_fit_are_refused(tmp_path):
    write_records(tmp_path / "train.rec", [(0, 0.0, jpeg()), (1 << 32, 0.0, jpeg())])
    with pytest.raises(DataError, match=r"train\.idx: key 4294967296, expected less than 2\^32"):
        open_set(tmp_path)
