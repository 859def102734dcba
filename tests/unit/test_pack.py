import io
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import pack as pack_module
from data_pipeline.errors import DataError
from data_pipeline.pack import pack, read_identities
from data_pipeline.recordio import RecordReader, read_index
from data_pipeline.shard_set import Sidecar, open_set
from data_pipeline.verify import verify
from tests.unit.record_sets import MAGIC, field_records, framed, image_folder, jpeg, payload, write_records

PEOPLE = {"Ann": 4, "Bo": 2, "Cy": 5}


@pytest.fixture
def source(tmp_path):
    return image_folder(tmp_path / "src", PEOPLE)


@pytest.fixture
def packed(source, tmp_path):
    pack(source, tmp_path / "set", 3, seed=1)
    return tmp_path / "set"


def records_of(folder):
    """(label, image) of every record, shard after shard, and where the index must find them."""
    found, offsets, base = [], [], 0
    for shard in sorted(folder.glob("shard_*.rec")):
        for record in RecordReader(shard):
            found.append((record.labels[0], record.image))
            offsets.append(base + record.offset)
        base += shard.stat().st_size
    return found, offsets


def test_jpeg_files_are_stored_byte_for_byte_under_the_labels_of_sorted_identities(source, packed):
    found, offsets = records_of(packed)
    expected = [(float(label), file.read_bytes()) for label, name in enumerate(sorted(PEOPLE)) for file in (source / name).iterdir()]
    assert sorted(found) == sorted(expected)
    keys, indexed = read_index(packed / "shards.idx")
    assert (keys.tolist(), indexed.tolist()) == (list(range(11)), offsets)


def test_the_sidecar_describes_the_shards(packed):
    sidecar = json.loads((packed / "shards.json").read_text())
    assert (sidecar["format_version"], sidecar["num_images"], sidecar["num_classes"], sidecar["seed"]) == (1, 11, 3, 1)
    assert (sidecar["identities"], sidecar["images_per_identity"]) == (["Ann", "Bo", "Cy"], [4, 2, 5])
    assert [shard["name"] for shard in sidecar["shards"]] == ["shard_00000.rec", "shard_00001.rec", "shard_00002.rec"]
    assert [shard["records"] for shard in sidecar["shards"]] == [4, 4, 3]
    for shard in sidecar["shards"]:
        assert shard["bytes"] == (packed / shard["name"]).stat().st_size
        assert shard["crc32"] == "".join(f"{zlib.crc32(record.payload):08x}" for record in RecordReader(packed / shard["name"]))


def test_images_are_shuffled_over_all_shards_by_the_seed_alone(source, tmp_path, packed):
    pack(source, tmp_path / "again", 3, seed=1)
    pack(source, tmp_path / "other", 3, seed=2)
    for file in packed.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    labels = [label for label, _ in records_of(packed)[0]]
    assert labels != sorted(labels)
    assert records_of(packed)[0] != records_of(tmp_path / "other")[0]


def test_other_formats_are_encoded_once_close_to_the_original(tmp_path):
    (tmp_path / "src" / "Ann").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (14, 14, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(tmp_path / "src" / "Ann" / "0.png")
    pack(tmp_path / "src", tmp_path / "set", 1)
    (record,) = RecordReader(tmp_path / "set" / "shard_00000.rec")
    (tmp_path / "back.jpg").write_bytes(record.image)
    with Image.open(tmp_path / "back.jpg") as image:
        assert (image.format, image.layer[1][1:3]) == ("JPEG", (1, 1))  # chroma is not subsampled
        assert np.abs(np.asarray(image, int) - pixels).mean() < 3


def test_only_the_listed_identities_are_packed(source, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"train": ["Cy", "Ann"], "test": ["Bo"]}))
    sidecar = pack(source, tmp_path / "set", 2, identities=read_identities(tmp_path / "split.json", "train"))
    assert (sidecar.identities, sidecar.images_per_identity) == (["Ann", "Cy"], [4, 5])


def test_identity_lists_that_do_not_fit_are_refused(source, tmp_path):
    listed = tmp_path / "ids.json"
    listed.write_text(json.dumps({"train": ["Ann", "Zed"], "bad": ["../up"], "up": [".."], "none": []}))
    refusals = {
        None: "splits train, bad, up, none; choose",
        "dev": "no split 'dev'",
        "none": "expected a list",
        "bad": "no plain",
        "up": "no plain",
    }
    for split, complaint in refusals.items():
        with pytest.raises(DataError, match=complaint):
            read_identities(listed, split)
    with pytest.raises(DataError, match="1 of 2 listed identities have no folder here, the first: 'Zed'"):
        pack(source, tmp_path / "set", 1, identities=read_identities(listed, "train"))
    listed.write_text("[1")
    with pytest.raises(DataError, match=r"ids\.json: cannot be read as JSON"):
        read_identities(listed, None)


def test_bad_sources_are_refused_by_name_and_leave_nothing(source, tmp_path):
    def refused(complaint, shards=2, folder=source):
        with pytest.raises(DataError, match=complaint):
            pack(folder, tmp_path / "out" / "set", shards)
        assert not list(tmp_path.glob("out/*"))
        assert not list(tmp_path.glob("out/.*"))

    refused("gone: no such folder", folder=tmp_path / "gone")
    refused(r"--shards 12: must lie in \[1, 11\]", shards=12)
    refused(r"--shards 0: must lie in", shards=0)
    (tmp_path / "hollow").mkdir()
    refused("hollow: no images", folder=tmp_path / "hollow")
    (source / "Dee").mkdir()
    refused("1 of 4 identities have no image, the first: 'Dee'")
    (source / "Dee" / "0.jpg").write_bytes(jpeg()[:-40])
    refused(r"Dee/0\.jpg: JPEG is cut short")
    (source / "Dee" / "0.jpg").write_bytes(b"hello")
    refused(r"Dee/0\.jpg: cannot be read as an image")
    png = io.BytesIO()
    Image.new("RGB", (112, 112)).save(png, "PNG")
    (source / "Dee" / "0.jpg").write_bytes(png.getvalue().replace(b"IDAT", b"I\0AT"))  # Pillow raises SyntaxError
    refused(r"Dee/0\.jpg: cannot be read as an image")
    (source / "Dee" / "0.jpg").write_bytes(b"P6 -1 112 255 ")  # Pillow raises ValueError
    refused(r"Dee/0\.jpg: cannot be read as an image")
    Image.fromarray(np.full((112, 112), 30000, np.uint16)).save(source / "Dee" / "0.jpg", "PNG")
    refused(r"Dee/0\.jpg: holds more than 8 bits per pixel and channel")
    (source / "Dee" / "0.jpg").write_bytes(jpeg(side=128))
    (source / "Dee" / "1.jpg").write_bytes(jpeg(side=100))
    refused(r"must be 112x112 pixels: .*Dee/\d\.jpg is 1\d\dx1\d\d; .*Dee/\d\.jpg is 1\d\dx1\d\d\. Align and crop", shards=1)


def test_an_existing_output_is_kept_unless_forced(source, packed):
    before = {file.name: file.read_bytes() for file in packed.iterdir()}
    with pytest.raises(DataError, match="set: exists already; give --force"):
        pack(source, packed, 2)
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == before
    pack(source, packed, 2, force=True)
    assert sorted(file.name for file in packed.iterdir()) == ["shard_00000.rec", "shard_00001.rec", "shards.idx", "shards.json"]
    assert not list(packed.parent.glob(".*"))


def test_force_deletes_nothing_but_a_set(source, packed):
    (packed / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"holds 'thesis\.tex', which is no part of such an output"):
        pack(source, packed, 2, force=True)
    assert (packed / "thesis.tex").read_text() == "years of work"
    assert len(list(packed.iterdir())) == 6


def test_force_through_a_symbolic_link_replaces_what_it_points_to(source, packed):
    link = packed.parent / "link"
    link.symlink_to(packed)
    pack(source, link, 2, force=True)
    assert link.is_symlink()
    assert sorted(file.name for file in packed.iterdir()) == ["shard_00000.rec", "shard_00001.rec", "shards.idx", "shards.json"]
    assert not list(packed.parent.glob(".*"))


def test_a_mount_point_is_refused_before_the_work(source):
    with pytest.raises(DataError, match="/: is a mount point"):
        pack(source, Path("/"), 1)


def test_a_stop_between_the_two_renames_keeps_the_old_set(source, packed, monkeypatch):
    before = {file.name: file.read_bytes() for file in packed.iterdir()}
    replace = os.replace

    def stopping(old, new):
        replace(old, new)
        if Path(old) == packed:
            raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.output.os.replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack(source, packed, 2, force=True)
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == before
    assert not list(packed.parent.glob(".*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_pack_leaves_nothing_and_keeps_the_old_set(source, packed, monkeypatch, error):
    before = {file.name: file.read_bytes() for file in packed.iterdir()}
    load, calls = pack_module._load, []

    def failing(path):
        calls.append(path)
        if len(calls) == 7:
            raise error
        return load(path)

    monkeypatch.setattr(pack_module, "_load", failing)
    for out, force in ((packed, True), (packed.parent / "fresh", False)):
        calls.clear()
        with pytest.raises(error):
            pack(source, out, 2, force=force)
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == before
    assert sorted(entry.name for entry in packed.parent.iterdir()) == ["set", "src"]


def test_a_packed_set_opens_with_labels_and_counts(packed):
    faces = open_set(packed)
    found, offsets = records_of(packed)
    assert (faces.layout, faces.num_images, faces.num_classes) == ("packed", 11, 3)
    np.testing.assert_array_equal(faces.offsets, offsets)
    np.testing.assert_array_equal(faces.labels, [label for label, _ in found])
    np.testing.assert_array_equal(faces.images_per_class, [4, 2, 5])
    np.testing.assert_array_equal(np.bincount(faces.labels), faces.images_per_class)


@pytest.mark.parametrize("header", [True, False])
def test_field_sets_open_as_their_image_records(tmp_path, header):
    records = field_records([2, 0, 3])
    write_records(tmp_path / "train.rec", records if header else [record for record in records if record[2]], shuffle=3)
    faces = open_set(tmp_path)
    assert (faces.layout, faces.num_images, faces.num_classes, faces.other_records) == ("field", 5, 3, 4 if header else 0)
    assert faces.labels.tolist() == [0, 0, 2, 2, 2]
    assert faces.keys.tolist() == [1, 2, 3, 4, 5]
    assert faces.images_per_class.tolist() == [2, 0, 3]
    assert open_set(tmp_path / "train.rec").digest == faces.digest
    assert not verify(tmp_path).findings


def test_labels_in_front_of_the_image_count_by_their_first(tmp_path):
    write_records(tmp_path / "any.rec", [(0, [1.0, 9.5], jpeg()), (1, [0.0, 2.5], jpeg()), (2, 1.0, jpeg())])
    assert open_set(tmp_path).labels.tolist() == [1, 0, 1]


def test_sets_that_cannot_be_read_are_refused_by_name(tmp_path, packed):
    shard = packed / "shard_00001.rec"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"shard_00001\.rec: \d+ bytes, the sidecar says \d+"):
        open_set(packed)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard_00001\.rec: the sidecar lists this shard, but it is missing"):
        open_set(packed)
    bad_sidecars = {"{": "not a readable sidecar", '{"format_version": 9}': "format version 9", '{"format_version": 1}': "exactly the keys"}
    for content, complaint in bad_sidecars.items():
        (packed / "shards.json").write_text(content)
        with pytest.raises(DataError, match=rf"shards\.json: .*{complaint}"):
            open_set(packed)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: expected .* found no \.rec file"):
        open_set(tmp_path / "none")
    with pytest.raises(DataError, match=r"gone: expected a folder .* found nothing"):
        open_set(tmp_path / "gone")
    (tmp_path / "none" / "train.rec").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.rec: the file is empty"):
        open_set(tmp_path / "none")
    (tmp_path / "none" / "train.rec").write_bytes(framed(payload(0.0, jpeg())))
    with pytest.raises(DataError, match=r"train\.idx: missing"):
        open_set(tmp_path / "none")
    (tmp_path / "none" / "train.idx").write_text("0\t0\n1\t0\n")
    with pytest.raises(DataError, match=r"train\.idx: lists offset 0 more than once"):
        open_set(tmp_path / "none")


@pytest.mark.parametrize(("label", "shown"), [(1.5, "1.5"), (-1.0, "-1"), (float("nan"), "nan"), (1e9, "1e.09")])
def test_a_label_that_is_no_class_is_named_with_shard_offset_and_key(tmp_path, label, shown):
    offsets = write_records(tmp_path / "train.rec", [(0, 0.0, jpeg()), (1, label, jpeg()), (2, 1.0, jpeg())])
    where = rf"train\.rec: record at offset {offsets[1]} \(key 1\)"
    with pytest.raises(DataError, match=rf"{where}: label {shown}, expected a whole number in \[0, "):
        open_set(tmp_path)
    assert f"train.rec: record at offset {offsets[1]} (key 1): label" in verify(tmp_path).findings[0]


def test_a_label_beyond_the_header_records_classes_is_named(tmp_path):
    records = field_records([2, 2])
    records[3] = (3, 2.0, records[3][2])
    offsets = write_records(tmp_path / "train.rec", records)
    expected = f"train.rec: record at offset {offsets[3]} (key 3): label 2, expected a whole number in [0, 2)"
    with pytest.raises(DataError, match=re.escape(expected)):
        open_set(tmp_path)
    assert verify(tmp_path).findings[0].endswith(expected)


def test_verify_finds_nothing_in_a_sound_set(packed):
    report = verify(packed)
    assert (report.records, report.images, report.findings) == (11, 11, [])


def test_verify_names_every_kind_of_damage(packed):
    sidecar = Sidecar.read(packed / "shards.json")
    shard = packed / "shard_00001.rec"
    sound = shard.read_bytes()
    records = list(RecordReader(shard))
    where = f"{shard}: record at offset {records[2].offset} (key {records[2].key}): "

    def findings(at, value):
        body = bytearray(sound)
        body[at : at + len(value)] = value
        shard.write_bytes(body)
        found = verify(packed).findings
        assert all(line.startswith(where) for line in found)
        return [line.removeprefix(where) for line in found]

    start = records[2].offset
    assert findings(start, b"\0")[0].startswith("magic number")
    assert findings(start + 4, b"\xff\xff\xff")[0].startswith("cut short")
    (flipped,) = findings(start + 8 + 24 + 300, b"\x00\x01")
    assert re.fullmatch(r"CRC32 [0-9a-f]{8}, the sidecar says [0-9a-f]{8}: the record changed after packing", flipped)
    assert findings(start + 12, b"\x00\x00\x40\x40")[0] == f"label 3, expected a whole number in [0, {sidecar.num_classes})"
    assert findings(start + 32, b"GIF8")[0].startswith("no JPEG: starts with 47494638")
    end = len(records[2].payload) + start + 8
    assert findings(end - 2, b"\0\0")[0].startswith("JPEG is cut short")
    shard.write_bytes(sound[: start + 60])
    assert len(verify(packed).findings) == 3  # the size, and records 2 and 3
    shard.unlink()
    assert verify(packed).findings == [f"{shard}: the sidecar lists this shard, but it is missing; copy it again or pack the set again"]


def test_verify_reads_on_without_an_index_and_reports_it(packed):
    (packed / "shards.idx").write_text("0\t0\nx\ty\n")
    report = verify(packed)
    assert (report.records, len(report.findings)) == (11, 1)
    assert "shards.idx: line 2" in report.findings[0]


def test_verify_names_bytes_that_no_index_line_reaches(tmp_path):
    offsets = write_records(tmp_path / "train.rec", [(key, 0.0, jpeg()) for key in range(4)])
    (tmp_path / "train.idx").write_text(f"0\t0\n2\t{offsets[2]}\n")
    middle, end = verify(tmp_path).findings
    assert f"(key 2): bytes {offsets[1]} to {offsets[2]} before it belong to no record" in middle
    assert f"bytes {offsets[3]} to {(tmp_path / 'train.rec').stat().st_size} at the end" in end


def test_verify_names_a_record_that_the_index_lists_twice(tmp_path):
    offsets = write_records(tmp_path / "train.rec", [(key, 0.0, jpeg()) for key in range(2)])
    (tmp_path / "train.idx").write_text(f"0\t0\n5\t0\n1\t{offsets[1]}\n")
    assert [line.partition("(")[2] for line in verify(tmp_path).findings] == [f"key 5): the record before it ends at {offsets[1]}"]


def test_a_jpeg_with_aligned_magic_survives_packing(tmp_path):
    plain = jpeg()
    head, comment = plain[:2], MAGIC + b"." * 8 + MAGIC * 2
    image = head + b"\xff\xfe" + (len(comment) + 2 + 2).to_bytes(2, "big") + b"xx" + comment + plain[2:]  # a JPEG comment segment
    assert image.find(MAGIC) % 4 == 0
    (tmp_path / "src" / "Ann").mkdir(parents=True)
    (tmp_path / "src" / "Ann" / "0.jpg").write_bytes(image)
    pack(tmp_path / "src", tmp_path / "set", 1)
    (record,) = RecordReader(tmp_path / "set" / "shard_00000.rec")
    assert record.image == image
    assert open_set(tmp_path / "set").labels.tolist() == [0]
    assert not verify(tmp_path / "set").findings
