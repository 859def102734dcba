"""Our RecordIO files against MXNet 1.9.1 itself, whose format it is. ``mxnet_side.py`` tells how to install it."""

import io
import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.pack import pack
from data_pipeline.recordio import MAGIC, RecordReader, RecordWriter, encode_payload, read_headers, read_index
from data_pipeline.shard_set import open_set
from data_pipeline.synthetic import write_synthetic
from tests.unit.record_sets import image_folder, jpeg

_PYTHON = os.environ.get("MXNET_PYTHON")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        not _PYTHON,
        reason="MXNET_PYTHON does not name a python with MXNet 1.9.1: RecordIO files were not exchanged with MXNet and its im2rec. "
        "tests/oracle/mxnet_side.py tells how to install it",
    ),
]
_MAGIC = struct.pack("<I", MAGIC)
_MAGIC_LABEL = struct.unpack("<f", _MAGIC)[0]  # -1.8e9


@pytest.fixture(scope="module")
def mxnet():
    """``mxnet(name, **arguments)`` calls a function of ``mxnet_side.py`` in MXNet's python; one process serves all tests."""
    command = [_PYTHON, Path(__file__).with_name("mxnet_side.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def call(name, **arguments):
            print(json.dumps({"do": name, **arguments}, default=str), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, f"MXNet's side ended during {name!r}; its traceback is in the captured stderr"
            return json.loads(answer)

        assert call("about")["version"] == "1.9.1"
        yield call


def records():
    """Every payload length mod 4, kind of label and place of the magic number, a large image; keys out of order, all 64 bits of id2."""
    rng = np.random.default_rng(0)
    ends = [bytes(range(1, n + 1)) for n in range(9)]
    whole = [_MAGIC, _MAGIC * 2, _MAGIC * 5, b"abcd" + _MAGIC, b"abcd" + _MAGIC * 3 + b"efgh" + _MAGIC, b"abcd" + _MAGIC[:3]]
    shifted = [bytes(n) + _MAGIC + bytes(m) for n in range(5) for m in range(4)]
    mixed = [b"".join(rng.choice([_MAGIC, b"abcd", b"e", _MAGIC[:2]]) for _ in range(rng.integers(1, 12))) for _ in range(100)]
    large = rng.bytes(1_300_001)
    images = [*ends, *whole, *shifted, *mixed, large, large[:600_000] + _MAGIC * 2 + large[600_000:] + _MAGIC]
    labels = [0.0, 7.0, -2.5, 0.1, 2.0**24, [3.0], [1.0, 2.0], [0.1, -1.0, 1e9, 4.0, 5.0], [_MAGIC_LABEL, 1.0], [2.0, _MAGIC_LABEL]]
    pairs = [(label, image) for image in ends + whole for label in labels]
    pairs += [(labels[k % len(labels)], image) for k, image in enumerate(images)]
    keys = (3 + 7 * rng.permutation(len(pairs))).tolist()
    return [
        {"key": key, "labels": label, "image": image.hex(), "id": key, "id2": key * 0x9E3779B97F4A7C15 % 2**64}
        for key, (label, image) in zip(keys, pairs, strict=True)
    ]


def as_stored(record):
    """What a reader must say of ``record``, as ``mxnet_side.py`` says it. Labels are float32."""
    labels = record["labels"]
    flag, values = (len(labels), labels) if isinstance(labels, list) else (0, [labels])
    values = np.array(values, np.float32).tolist()
    return {"flag": flag, "labels": values if flag else values[0], "id": record["id"], "id2": record["id2"], "image": record["image"]}


def as_read(record):
    """A ``Record`` of ours in the same words."""
    labels = list(record.labels) if record.flag else record.labels[0]
    return {"flag": record.flag, "labels": labels, "id": record.id, "id2": record.id2, "image": record.image.hex()}


def write_ours(rec, idx, some):
    with RecordWriter(rec, idx) as writer:
        for record in some:
            writer.write(record["key"], record["labels"], bytes.fromhex(record["image"]), id2=record["id2"])


def shuffle_lines(path, seed=0):
    lines = path.read_text().splitlines(keepends=True)
    np.random.default_rng(seed).shuffle(lines)
    path.write_text("".join(lines))


def test_mxnet_reads_what_we_write(tmp_path, mxnet):
    rec, idx, written = tmp_path / "ours.rec", tmp_path / "ours.idx", records()
    write_ours(rec, idx, written)
    assert mxnet("read_in_order", rec=rec) == [as_stored(record) for record in written]
    shuffle_lines(idx)
    by_key = sorted(written, key=lambda record: record["key"])
    assert mxnet("read_by_key", rec=rec, idx=idx, keys=[record["key"] for record in by_key]) == [as_stored(record) for record in by_key]


def test_we_read_what_mxnet_writes(tmp_path, mxnet):
    rec, idx, written = tmp_path / "theirs.rec", tmp_path / "theirs.idx", records()
    mxnet("write", rec=rec, idx=idx, records=written)
    assert [as_read(record) for record in RecordReader(rec)] == [as_stored(record) for record in written]
    shuffle_lines(idx)
    by_key = {record["key"]: as_stored(record) for record in written}
    found = list(RecordReader(rec, idx))
    assert {record.key: as_read(record) for record in found} == by_key
    assert [record.key for record in found] == [int(line.split("\t")[0]) for line in idx.read_text().splitlines()]
    keys, offsets = read_index(idx)
    headers = read_headers(rec, keys, offsets)
    expected = [by_key[key] for key in keys.tolist()]
    assert headers.labels.tolist() == [record["labels"][0] if record["flag"] else record["labels"] for record in expected]
    assert headers.is_image.tolist() == [not record["flag"] or record["image"] != "" for record in expected]


def test_both_write_the_same_bytes(tmp_path, mxnet):
    written = records()
    write_ours(tmp_path / "ours.rec", tmp_path / "ours.idx", written)
    mxnet("write", rec=tmp_path / "theirs.rec", idx=tmp_path / "theirs.idx", records=written)
    assert (tmp_path / "ours.rec").read_bytes() == (tmp_path / "theirs.rec").read_bytes()
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_both_encode_the_same_payload(mxnet):
    some = [record | {"id": 2**64 - 1 - record["key"]} for record in records()]
    ours = [encode_payload(record["labels"], bytes.fromhex(record["image"]), id=record["id"], id2=record["id2"]).hex() for record in some]
    assert ours == mxnet("pack_all", records=some)


def test_we_read_the_magic_number_in_labels_and_ids_which_we_refuse_to_write(tmp_path, mxnet):
    places = [{"labels": _MAGIC_LABEL}, {"id": MAGIC}, {"id": MAGIC << 32}, {"id2": MAGIC}, {"id2": MAGIC << 32 | MAGIC}]
    places += [{"labels": [4.0, 5.0], "id": MAGIC, "image": ""}]
    written = [{"key": key, "labels": 2.0, "image": "ffd8", "id": key, "id2": 0} | place for key, place in enumerate(places)]
    rec, idx = tmp_path / "theirs.rec", tmp_path / "theirs.idx"
    mxnet("write", rec=rec, idx=idx, records=written)
    assert [as_read(record) for record in RecordReader(rec, idx)] == [as_stored(record) for record in written]
    headers = read_headers(rec, *read_index(idx))
    assert headers.labels.tolist() == [_MAGIC_LABEL, 2.0, 2.0, 2.0, 2.0, 4.0]
    assert headers.is_image.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize(("encoding", "quality", "tolerance"), [(".png", 3, 0), (".jpg", 95, 6)])
def test_we_read_images_that_mxnet_encodes(tmp_path, mxnet, encoding, quality, tolerance):
    ramp = np.arange(112, dtype=np.uint8)
    rgb = np.stack(np.broadcast_arrays(2 * ramp[:, None], 2 * ramp[None, :], np.uint8(90)), axis=-1)
    some = [
        {"key": key, "labels": labels, "image": np.roll(rgb, key, axis=-1)[..., ::-1].tobytes().hex(), "id": key, "id2": 0}
        for key, labels in enumerate([4.0, [5.0, 0.25], 6.0])
    ]
    rec, idx = tmp_path / "theirs.rec", tmp_path / "theirs.idx"
    mxnet("write_pixels", rec=rec, idx=idx, records=some, shape=rgb.shape, encoding=encoding, quality=quality)
    found = list(RecordReader(rec, idx))
    assert [record.labels for record in found] == [(4.0,), (5.0, 0.25), (6.0,)]
    for record in found:
        pixels = np.asarray(Image.open(io.BytesIO(record.image)), np.int16)
        np.testing.assert_allclose(pixels, np.roll(rgb, record.key, axis=-1), atol=tolerance)


def im2rec(mxnet, *arguments):
    """The program as MXNet ships it, in a process of its own."""
    subprocess.run([_PYTHON, mxnet("about")["im2rec"], *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, timeout=60)


def listed(lst):
    """The lines of a .lst file: ``key<TAB>label<TAB>...<TAB>file``."""
    lines = [line.split("\t") for line in lst.read_text().splitlines()]
    return [(int(key), tuple(map(float, labels)), file) for key, *labels, file in lines]


def test_a_folder_packed_by_im2rec_is_read(tmp_path, mxnet):
    root, prefix = tmp_path / "faces", tmp_path / "set" / "train"
    prefix.parent.mkdir()
    write_synthetic(root, identities=3, images_per_identity=4, seed=0)
    im2rec(mxnet, "--list", "--recursive", prefix, root)
    im2rec(mxnet, "--pass-through", prefix, root)
    lines = listed(prefix.with_suffix(".lst"))
    assert [key for key, _, _ in lines] != sorted(key for key, _, _ in lines)  # im2rec shuffles the list
    assert {(labels, Path(file).parent.name) for _, labels, file in lines} == {((float(k),), f"id_{k:05d}") for k in range(3)}
    rec, idx = prefix.with_suffix(".rec"), prefix.with_suffix(".idx")
    expected = [(key, labels, (root / file).read_bytes()) for key, labels, file in lines]
    assert [(record.key, record.labels, record.image) for record in RecordReader(rec, idx)] == expected
    assert [(record.id, record.labels, record.image) for record in RecordReader(rec)] == expected
    faces = open_set(prefix.parent)
    assert (faces.num_images, faces.num_classes) == (12, 3)


def test_im2recs_records_of_several_labels_are_read_and_the_first_is_the_class(tmp_path, mxnet):
    prefix = tmp_path / "train"
    image_folder(tmp_path / "faces", {"a": 2, "b": 1})
    lines = [(7, (1.0, 0.5), "b/0.jpg"), (2, (0.0, -3.0), "a/1.jpg"), (5, (0.0, 0.1), "a/0.jpg")]
    prefix.with_suffix(".lst").write_text("".join(f"{key}\t{a}\t{b}\t{file}\n" for key, (a, b), file in lines))
    im2rec(mxnet, "--pass-through", "--pack-label", prefix, tmp_path / "faces")
    found = list(RecordReader(prefix.with_suffix(".rec"), prefix.with_suffix(".idx")))
    assert [record.key for record in found] == [7, 2, 5]
    np.testing.assert_array_equal([record.labels for record in found], np.array([labels for _, labels, _ in lines], np.float32))
    assert [record.image for record in found] == [(tmp_path / "faces" / file).read_bytes() for _, _, file in lines]
    faces = open_set(prefix.with_suffix(".rec"))
    assert (faces.num_images, faces.num_classes) == (3, 2)


def test_mxnet_reads_a_packed_set(tmp_path, mxnet):
    source, out = image_folder(tmp_path / "faces", {"a": 3, "b": 2, "c": 5, "d": 1}), tmp_path / "packed"
    pack([source], out, 3, seed=4)
    lines = [tuple(map(int, line.split("\t"))) for line in (out / "shards.idx").read_text().splitlines()]
    in_order, by_offset, start = [], [], 0
    for shard in sorted(out.glob("shard_*.rec")):
        in_order += mxnet("read_in_order", rec=shard)
        end = start + shard.stat().st_size
        own, idx = [(key, offset - start) for key, offset in lines if start <= offset < end], tmp_path / f"{shard.stem}.idx"
        idx.write_text("".join(f"{key}\t{offset}\n" for key, offset in own))
        by_offset += mxnet("read_by_key", rec=shard, idx=idx, keys=[key for key, _ in own])
        start = end
    assert len(list(out.glob("shard_*.rec"))) == 3
    assert by_offset == in_order
    assert [record["id"] for record in by_offset] == [key for key, _ in lines] == list(range(11))
    files = [(float(label), file.read_bytes().hex()) for label, name in enumerate("abcd") for file in (source / name).iterdir()]
    assert sorted((record["labels"], record["image"]) for record in in_order) == sorted(files)


@pytest.mark.parametrize("order", ["header first", "header last", "identity before its images"])
def test_the_fields_layout_written_by_mxnet_opens(tmp_path, mxnet, order):
    """Of 5 images and 3 identities, in the three orders that the field's tools write (packers, InsightFace's merging and cleaning)."""
    ranges = [(1, 3), (3, 4), (4, 6)]  # of keys
    header = {"key": 0, "labels": [6.0, 9.0], "image": ""}
    identities = [{"key": 6 + label, "labels": [float(first), float(end)], "image": ""} for label, (first, end) in enumerate(ranges)]
    images = [
        {"key": key, "labels": float(label), "image": jpeg(mark=key).hex()} for label, ends in enumerate(ranges) for key in range(*ends)
    ]
    if order == "header first":
        written = [header, *images, *identities]
    elif order == "header last":
        written = [*images, *identities, header]
    else:
        written = [header]
        for label, identity in enumerate(identities):
            written += [identity, *(image for image in images if image["labels"] == label)]
    written = [record | {"id": record["key"], "id2": 0} for record in written]
    mxnet("write", rec=tmp_path / "train.rec", idx=tmp_path / "train.idx", records=written)
    faces = open_set(tmp_path)
    assert (faces.num_images, faces.num_classes) == (5, 3)
    found = list(RecordReader(tmp_path / "train.rec", tmp_path / "train.idx"))
    assert [as_read(record) for record in found] == [as_stored(record) for record in written]
    assert [record.key for record in found if record.is_image] == [1, 2, 3, 4, 5]
