import io
import json
import os
from collections import Counter

import pytest
from PIL import Image

from data_pipeline import unpack as module
from data_pipeline.errors import DataError
from data_pipeline.pack import pack
from data_pipeline.quarantine import Unfit, write_quarantine
from data_pipeline.recordio import RecordReader
from data_pipeline.shard_set import open_set
from data_pipeline.unpack import unpack
from tests.unit.record_sets import MAGIC, commented, field_records, framed, image_folder, jpeg, payload, write_records


@pytest.fixture
def packed(tmp_path):
    pack([image_folder(tmp_path / "src", {"Ann": 4, "Bo": 2, "Cy": 5})], tmp_path / "set", 3)
    return tmp_path / "set"


def tree(folder):
    """{path in the folder: bytes} of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*")}


def images_by_identity(folder):
    """(name of the identity, bytes) of every record of a packed set."""
    names = json.loads((folder / "identities.json").read_text())
    return Counter((names[int(record.labels[0])], record.image) for shard in folder.glob("shard_*.rec") for record in RecordReader(shard))


def only_hidden(folder, *names):
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in names)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_image_lies_under_its_identity_and_key(packed, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 3)  # so that there are four jobs
    done = unpack(packed, tmp_path / "out", workers=workers)
    names = json.loads((packed / "identities.json").read_text())
    records = [record for shard in packed.glob("shard_*.rec") for record in RecordReader(shard)]
    assert tree(tmp_path / "out") == {f"{names[int(record.labels[0])]}/{record.id:08d}.jpg": record.image for record in records}
    assert (done.images, done.identities, done.empty_identities, done.quarantined) == (11, 3, 0, 0)


def test_a_packed_set_survives_unpacking_and_packing(packed, tmp_path):
    unpack(packed, tmp_path / "out")
    pack([tmp_path / "out"], tmp_path / "again", 2, seed=9)
    assert images_by_identity(tmp_path / "again") == images_by_identity(packed)
    assert open_set(tmp_path / "again").identities() == open_set(packed).identities()


def test_names_that_are_no_text_survive(tmp_path):
    name = os.fsdecode(b"no\xfftext \n")
    os.makedirs(tmp_path / "src" / name)
    (tmp_path / "src" / name / "0.jpg").write_bytes(jpeg())
    pack([tmp_path / "src"], tmp_path / "set", 1)
    unpack(tmp_path / "set", tmp_path / "out")
    assert tree(tmp_path / "out") == {f"{name}/00000000.jpg": jpeg()}


def test_a_field_set_with_several_labels_and_parts_survives(tmp_path):
    image = commented(jpeg(), b"xx" + MAGIC)
    body = payload([1.0, 7.5], image, 1)
    cut = body.index(MAGIC)
    assert cut % 4 == 0
    png = io.BytesIO()
    Image.new("RGB", (112, 112)).save(png, "PNG")
    records = [
        framed(body[:cut], 1) + framed(body[cut + 4 :], 3),
        framed(payload([0.0, 2.0], commented(jpeg(), b"b"), 123456789)),
        framed(payload(11.0, png.getvalue(), 3)),
    ]
    offsets = [0, len(records[0]), len(records[0]) + len(records[1])]
    (tmp_path / "a.rec").write_bytes(b"".join(records))
    (tmp_path / "a.idx").write_text("".join(f"{key}\t{at}\n" for key, at in zip((1, 123456789, 3), offsets, strict=True)))
    done = unpack(tmp_path / "a.rec", tmp_path / "out")
    assert tree(tmp_path / "out") == {
        "01/00000001.jpg": image,
        "00/123456789.jpg": commented(jpeg(), b"b"),
        "11/00000003.png": png.getvalue(),
    }
    assert (done.identities, done.empty_identities) == (3, 9)
    pack([tmp_path / "out"], tmp_path / "set", 1)
    stored = images_by_identity(tmp_path / "set")
    assert {("01", image), ("00", commented(jpeg(), b"b"))} < stored.keys()
    assert sorted(name for name, _ in stored) == ["00", "01", "11"]


def test_labels_of_a_field_set_without_empty_classes_come_back(tmp_path):
    write_records(tmp_path / "train.rec", field_records([1] * 12))
    unpack(tmp_path, tmp_path / "out")
    pack([tmp_path / "out"], tmp_path / "set", 1)
    stored = {record.image: int(record.labels[0]) for record in RecordReader(tmp_path / "set/shard_00000.rec")}
    assert stored == {image: int(label) for _, label, image in field_records([1] * 12) if image}


def test_the_folders_of_a_list_are_the_identities(tmp_path):
    write_records(tmp_path / "train.rec", field_records([1, 1]))
    (tmp_path / "train.lst").write_text("1\t0\tf/Zoë/1.jpg\n2\t1\tf/Ann/2.jpg\n")
    unpack(tmp_path, tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == ["Ann/00000002.jpg", "Zoë/00000001.jpg"]


@pytest.mark.parametrize("layout", ["packed", "field"])
def test_records_in_quarantine_are_left_out_and_counted(packed, tmp_path, layout):
    if layout == "field":
        (tmp_path / "field").mkdir()
        write_records(tmp_path / "field/train.rec", field_records([2, 1]))
    path = packed if layout == "packed" else tmp_path / "field/train.rec"
    faces = open_set(path)
    shard, offset, key = faces.place(1)
    write_quarantine(path, faces.shards, [Unfit(faces.shards[shard].name, offset, key, "blurred")])
    done = unpack(path, tmp_path / "out")
    assert (done.images, done.quarantined) == (faces.num_images - 1, 1)
    assert not [name for name in tree(tmp_path / "out") if name.endswith(f"/{key:08d}.jpg")]
    assert len(tree(tmp_path / "out")) == faces.num_images - 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_record_is_named_and_nothing_is_left(packed, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 3)
    shard = packed / "shard_00001.rec"
    record = list(RecordReader(shard))[2]
    body = bytearray(shard.read_bytes())
    body[record.offset + 400] ^= 1
    shard.write_bytes(body)
    complaint = (
        rf"shard_00001\.rec: record at offset {record.offset} \(key {record.id}\): CRC32 .* `python -m data_pipeline verify {packed}`"
    )
    with pytest.raises(DataError, match=complaint):
        unpack(packed, tmp_path / "out", workers=workers)
    assert only_hidden(tmp_path, "src", "set") == []


@pytest.mark.parametrize("image", [b"GIF89a...", b"\xff\xd8"])
def test_what_is_neither_jpeg_nor_png_is_named(tmp_path, image):
    write_records(tmp_path / "train.rec", [(7, 0.0, image)])
    with pytest.raises(DataError, match=rf"record at offset 0 \(key 7\): starts with '{image[:4].hex()}', which is neither JPEG nor PNG"):
        unpack(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["../up", "/tmp/abs", "..", ".", "", ".hidden", "a/b", "nul\0", 7])
def test_names_that_are_no_plain_folders_are_refused(packed, tmp_path, name):
    (packed / "identities.json").write_text(json.dumps(["Ann", name, "Cy"]))
    with pytest.raises(DataError, match="which is no plain folder name"):
        unpack(packed, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_two_identities_of_one_name_are_refused(packed, tmp_path):
    (packed / "identities.json").write_text(json.dumps(["Ann", "Cy", "Cy"]))
    with pytest.raises(DataError, match="two identities 'Cy'"):
        unpack(packed, tmp_path / "out")


def test_two_records_of_one_key_are_refused(tmp_path):
    write_records(tmp_path / "train.rec", [(7, 0.0, jpeg()), (8, 0.0, jpeg())])
    (tmp_path / "train.idx").write_text((tmp_path / "train.idx").read_text().replace("8\t", "7\t"))
    with pytest.raises(DataError, match=r"0/00000007\.jpg: another record of this identity has the same key"):
        unpack(tmp_path, tmp_path / "out")


def test_an_existing_folder_is_refused(packed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(DataError, match="out: exists already"):
        unpack(packed, tmp_path / "out")
    with pytest.raises(DataError, match="--workers 0: must be at least 1"):
        unpack(packed, tmp_path / "new", workers=0)
