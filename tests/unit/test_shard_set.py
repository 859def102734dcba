import json
import re

import numpy as np
import pytest

from data_pipeline import field_set
from data_pipeline.errors import DataError
from data_pipeline.pack import pack
from data_pipeline.quarantine import Unfit, write_quarantine
from data_pipeline.shard_set import open_set
from data_pipeline.verify import verify
from tests.unit.record_sets import field_records, framed, image_folder, jpeg, payload, write_records


@pytest.fixture
def packed(tmp_path):
    pack([image_folder(tmp_path / "src", {"Ann": 4, "Bo": 2, "Cy": 5})], tmp_path / "set", 3)
    return tmp_path / "set"


@pytest.mark.parametrize("header", [True, False])
def test_field_sets_open_as_their_image_records(tmp_path, header):
    records = field_records([2, 0, 3])
    offsets = write_records(tmp_path / "train.rec", records if header else [record for record in records if record[2]], shuffle=3)
    faces = open_set(tmp_path)
    assert (faces.layout, faces.num_images, faces.num_classes, faces.other_records) == ("field", 5, 3, 4 if header else 0)
    assert faces.labels.tolist() == [0, 0, 2, 2, 2]
    assert faces.records["key"].tolist() == [1, 2, 3, 4, 5]
    assert faces.records["offset"].tolist() == offsets[header : header + 5]
    assert faces.records["length"].tolist() == [32 + len(image) + -len(image) % 4 for _, _, image in records[1:6]]
    assert faces.images_per_class.tolist() == [2, 0, 3]
    assert open_set(tmp_path / "train.rec").digest == faces.digest


def test_what_is_kept_of_a_large_field_set_is_what_was_found(tmp_path, monkeypatch):
    write_records(tmp_path / "train.rec", field_records([2, 0, 3]), shuffle=3)
    found = open_set(tmp_path)
    monkeypatch.setattr(field_set, "_KEEP_FROM", 0)
    for _ in range(2):
        kept = open_set(tmp_path)
        np.testing.assert_array_equal(kept.records, found.records)
        assert (kept.digest, kept.num_classes, kept.other_records) == (found.digest, 3, 4)
        monkeypatch.setattr(field_set, "read_headers", lambda *_: pytest.fail("read the records again"))


@pytest.mark.parametrize("order", ["of the file", "shuffled", "two records changed places"])
def test_an_index_that_is_read_in_pieces_makes_the_same_table(tmp_path, monkeypatch, order):
    records = field_records([2, 0, 3, 4])
    write_records(tmp_path / "train.rec", records, shuffle=1 if order == "shuffled" else None)
    if order == "two records changed places":
        lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
        lines[7], lines[8] = lines[8], lines[7]
        (tmp_path / "train.idx").write_text("".join(lines))
    whole = open_set(tmp_path)
    monkeypatch.setattr(field_set, "_INDEX_BLOCK", 1)  # a line each
    faces = open_set(tmp_path)
    np.testing.assert_array_equal(faces.records, whole.records)
    assert (faces.num_images, faces.num_classes, faces.other_records, faces.digest) == (9, 4, 5, whole.digest)


def test_bad_labels_are_counted_over_all_pieces_and_the_first_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(field_set, "_INDEX_BLOCK", 16)
    monkeypatch.setattr(field_set, "_ROWS", 2)
    records = field_records([4, 4])
    for key, label in ((3, 2.0), (5, float("nan")), (8, 7.0)):
        records[key] = (key, label, records[key][2])
    offsets = write_records(tmp_path / "train.rec", records)
    complaint = rf"offset {offsets[3]} \(key 3\): label 2, expected a whole number in \[0, 2\); 3 of 8 image records are like that"
    with pytest.raises(DataError, match=complaint):
        open_set(tmp_path)


def test_labels_in_front_of_the_image_count_by_their_first(tmp_path):
    write_records(tmp_path / "any.rec", [(0, [1.0, 9.5], jpeg()), (1, [0.0, 2.5], jpeg())])
    assert open_set(tmp_path).labels.tolist() == [1, 0]


def test_packed_sets_that_cannot_be_read_are_refused_by_name(packed):
    shard = packed / "shard_00001.rec"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"shard_00001\.rec: \d+ bytes, the sidecar says \d+"):
        open_set(packed)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard_00001\.rec: the sidecar lists this shard, but it is missing"):
        open_set(packed)
    bad_sidecars = {"{": "not a readable sidecar", '{"format_version": 1}': "format version 1", '{"format_version": 2}': "exactly the keys"}
    for content, complaint in bad_sidecars.items():
        (packed / "shards.json").write_text(content)
        with pytest.raises(DataError, match=rf"shards\.json: .*{complaint}"):
            open_set(packed)


@pytest.mark.parametrize("name", ["/{folder}/secret.rec", "../secret.rec", "..", "", "sub/a.rec", "a\0.rec", 7])
def test_a_sidecar_cannot_name_files_elsewhere(packed, tmp_path, name):
    """Of the size that it says: nothing but the name is wrong."""
    sidecar = json.loads((packed / "shards.json").read_text())
    (packed / "sub").mkdir()
    for stranger in (tmp_path / "secret.rec", packed / "sub" / "a.rec"):
        stranger.write_bytes((packed / "shard_00001.rec").read_bytes())
    name = name.format(folder=tmp_path) if isinstance(name, str) else name
    sidecar["shards"][1]["name"] = name
    (packed / "shards.json").write_text(json.dumps(sidecar))
    for read in (open_set, verify):
        with pytest.raises(DataError, match=re.escape(f"{packed}/shards.json: names the shard {name!r}, which is no file beside it")):
            read(packed)


@pytest.mark.parametrize("name", ["/etc/passwd", "../set/shard_00000.rec", "shard_9.rec", ""])
def test_a_quarantine_cannot_name_files_elsewhere(packed, name):
    faces = open_set(packed)
    records = [Unfit(faces.shards[0].name, 0, 0, "blurred"), Unfit(name, 0, 0, "blurred")]
    write_quarantine(packed, faces.shards, records)
    with pytest.raises(DataError, match=re.escape(f"{packed}/quarantine.jsonl: line 3 names {name!r}, which is no shard of the set")):
        open_set(packed)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "of another set"])
def test_a_table_that_is_no_table_of_the_set_is_refused(packed, tmp_path, damage):
    table = packed / "records.npy"
    if damage == "of another set":
        pack([tmp_path / "src"], tmp_path / "other", 3, identities=["Ann"])
        table.write_bytes((tmp_path / "other/records.npy").read_bytes())
    else:
        table.write_bytes({"cut": table.read_bytes()[:-8], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(DataError, match=r"records\.npy: .* pack the set again"):
        open_set(packed)


def test_field_sets_that_cannot_be_read_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"gone: expected a folder .* found nothing"):
        open_set(tmp_path / "gone")
    with pytest.raises(DataError, match=r"expected .* found no \.rec file"):
        open_set(tmp_path)
    rec, index = tmp_path / "train.rec", tmp_path / "train.idx"
    rec.write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.rec: the file is empty"):
        open_set(tmp_path)
    rec.write_bytes(framed(payload(0.0, jpeg())))
    with pytest.raises(DataError, match=r"train\.idx: missing"):
        open_set(tmp_path)
    index.write_text("0\t0\n1\t0\n")
    with pytest.raises(DataError, match=r"train\.idx: lists offset 0 more than once"):
        open_set(tmp_path)


@pytest.mark.parametrize(("label", "shown"), [(1.5, "1.5"), (-1.0, "-1"), (float("nan"), "nan"), (1e9, "1e.09")])
def test_a_label_that_is_no_class_is_named_with_shard_offset_and_key(tmp_path, label, shown):
    offsets = write_records(tmp_path / "train.rec", [(0, 0.0, jpeg()), (1, label, jpeg()), (2, 1.0, jpeg())])
    where = rf"train\.rec: record at offset {offsets[1]} \(key 1\)"
    with pytest.raises(DataError, match=rf"{where}: label {shown}, expected a whole number in \[0, "):
        open_set(tmp_path)


def test_a_label_beyond_the_header_records_classes_is_named(tmp_path):
    records = field_records([2, 2])
    records[3] = (3, 2.0, records[3][2])
    offsets = write_records(tmp_path / "train.rec", records)
    expected = f"train.rec: record at offset {offsets[3]} (key 3): label 2, expected a whole number in [0, 2)"
    with pytest.raises(DataError, match=re.escape(expected)):
        open_set(tmp_path)
