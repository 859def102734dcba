import struct

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.recordio import RecordReader, RecordWriter, encode_payload, index_blocks, read_headers, read_index
from tests.unit.record_sets import MAGIC, field_records, framed, jpeg, payload, write_records


@pytest.mark.faces
def test_a_file_written_by_others_reads_by_index_and_in_file_order(faces):
    rec, idx = faces / "records" / "adaface_train.rec", faces / "records" / "adaface_train.idx"
    by_index = list(RecordReader(rec, idx))
    assert [record.key for record in by_index] == [0, 4, 7, 5, 1, 6, 3, 2]
    assert [record.offset for record in by_index] == [0, 5500, 11228, 16648, 21660, 26504, 33296, 38568]
    assert {record.key: record.labels for record in by_index} == {key: (float(key >= 4),) for key in range(8)}
    assert all(record.image.startswith(b"\xff\xd8") and record.image.endswith(b"\xff\xd9") for record in by_index)
    in_file_order = list(RecordReader(rec))
    assert in_file_order == by_index  # the index lists the records in file order, and every id is its key


def test_header_and_identity_records_are_read_and_told_from_images(tmp_path):
    records = field_records([2, 3])
    write_records(tmp_path / "train.rec", records, shuffle=1)
    found = {record.key: record for record in RecordReader(tmp_path / "train.rec", tmp_path / "train.idx")}
    assert {key: record.is_image for key, record in found.items()} == {key: bool(image) for key, _, image in records}
    assert found[0].labels == (6.0, 8.0)
    assert found[7].labels == (3.0, 6.0)
    assert [found[key].image for key in range(1, 6)] == [image for _, _, image in records[1:6]]


def test_several_labels_before_an_image_are_read(tmp_path):
    write_records(tmp_path / "a.rec", [(3, [4.0, 0.5, -1.0], b"image"), (4, 2.0, b"next")])
    several, one = RecordReader(tmp_path / "a.rec")
    assert (several.labels, several.image, several.flag, several.is_image, several.key) == ((4.0, 0.5, -1.0), b"image", 3, True, 3)
    assert (one.labels, one.image) == ((2.0,), b"next")


def test_the_writer_writes_the_documented_bytes(tmp_path):
    with RecordWriter(tmp_path / "a.rec", tmp_path / "a.idx", base=1000) as writer:
        offsets = [writer.write(5, 7.0, b"abcde"), writer.write(6, [1.0, 2.0], b"xyz")]
    assert (tmp_path / "a.rec").read_bytes() == framed(payload(7.0, b"abcde", 5)) + framed(payload([1.0, 2.0], b"xyz", 6))
    assert (tmp_path / "a.idx").read_text() == "".join(f"{key}\t{1000 + offset}\n" for key, offset in zip((5, 6), offsets, strict=True))


def test_an_image_with_aligned_magic_is_split_as_the_format_says_and_joined_again(tmp_path):
    image = b"abcd" + MAGIC + b"efghijkl" + MAGIC + MAGIC + b"mno"
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(0, 1.0, image)
    head = encode_payload(1.0, b"abcd")
    parts = framed(head, 1) + framed(b"efghijkl", 2) + framed(b"", 2) + framed(b"mno", 3)
    assert (tmp_path / "a.rec").read_bytes() == parts
    (record,) = RecordReader(tmp_path / "a.rec")
    assert (record.image, record.end) == (image, len(parts))


def test_images_full_of_magic_round_trip_at_every_alignment(tmp_path):
    rng = np.random.default_rng(0)
    images = [b"".join(rng.choice([MAGIC, b"abcd", b"e", MAGIC[:2]]) for _ in range(rng.integers(0, 12))) for _ in range(500)]
    with RecordWriter(tmp_path / "a.rec", tmp_path / "a.idx") as writer:
        for key, image in enumerate(images):
            writer.write(key, float(key), image)
    assert [record.image for record in RecordReader(tmp_path / "a.rec")] == images
    keys, offsets = read_index(tmp_path / "a.idx")
    headers = read_headers(tmp_path / "a.rec", keys, offsets)
    np.testing.assert_array_equal(headers.labels, np.arange(500))
    np.testing.assert_array_equal(headers.lengths, np.diff([*offsets, (tmp_path / "a.rec").stat().st_size]))


def test_the_writer_refuses_magic_where_dali_cannot_read_it(tmp_path):
    with RecordWriter(tmp_path / "a.rec") as writer, pytest.raises(DataError, match=r"a\.rec: record 3470205706: .*magic number"):
        writer.write(0xCED7230A, 1.0, b"image")


def test_fast_headers_agree_with_the_reader(tmp_path):
    write_records(tmp_path / "a.rec", [*field_records([3, 1, 4]), (99, [5.0, 6.0], jpeg())])
    keys, offsets = read_index(tmp_path / "a.idx")
    headers = read_headers(tmp_path / "a.rec", keys, offsets, chunk=4)
    records = list(RecordReader(tmp_path / "a.rec"))
    assert headers.labels.tolist() == [record.labels[0] for record in records]
    assert headers.is_image.tolist() == [record.is_image for record in records]
    assert headers.lengths.tolist() == [record.end - record.offset for record in records]


def test_an_index_reads_the_same_in_pieces_of_any_size(tmp_path):
    lines = [(key, 5 * key**3) for key in range(40)]
    (tmp_path / "a.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in lines) + "\n\n")
    for size in (1, 7, 50, 1 << 20):
        blocks = list(index_blocks(tmp_path / "a.idx", size))
        assert [pair for keys, offsets in blocks for pair in zip(keys.tolist(), offsets.tolist(), strict=True)] == lines
    assert read_index(tmp_path / "a.idx")[1].tolist() == [offset for _, offset in lines]
    (tmp_path / "a.idx").write_text("1\t2\n" * 30 + "x\t2\n" + "1\t2\n" * 9)
    for size in (1, 50, 1 << 20):
        with pytest.raises(DataError, match="line 31: "):
            list(index_blocks(tmp_path / "a.idx", size))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0\t0\nimg\t8\n", r"line 2: expected `key<TAB>offset`, two whole numbers, found 'img\\t8'"),
        ("0\t0\n1\n", "line 2: "),
        ("0\t0\t5\n", "line 1: "),
        ("0\t-8\n", "line 1: "),
        ("0\t1.5\n", "line 1: "),
        ("", "the index is empty"),
        ("\n \n", "the index is empty"),
    ],
)
def test_a_bad_index_line_is_named(tmp_path, text, complaint):
    (tmp_path / "a.idx").write_text(text)
    with pytest.raises(DataError, match=rf"a\.idx: {complaint}"):
        read_index(tmp_path / "a.idx")


def _damage(body: bytearray, offset: int, kind: str) -> bytes:
    if kind == "magic":
        body[offset] ^= 1
    elif kind == "continuation":
        body[offset + 7] |= 2 << 5
    elif kind == "cut in the body":
        del body[offset + 50 :]
    elif kind == "cut in the frame":
        del body[offset + 3 :]
    elif kind == "cut before":
        del body[offset:]
    elif kind == "too many labels":
        body[offset + 8 : offset + 12] = struct.pack("<I", 4000)
    elif kind == "no room for a header":
        body[offset + 4 : offset + 8] = struct.pack("<I", 20)
    return bytes(body)


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("magic", "magic number 0xced7230b at byte OFFSET, expected 0xced7230a"),
        ("continuation", "continuation flag 2 at byte OFFSET, expected 0 or 1"),
        ("cut in the body", "cut short, 42 of [0-9]+ bytes of the part"),
        ("cut in the frame", "cut short, 3 of 8 bytes of the part"),
        ("cut before", "nothing at byte OFFSET, the file ends at OFFSET"),
        ("too many labels", "announces 4000 labels"),
        ("no room for a header", "20 bytes, less than the 24"),
    ],
)
def test_damage_is_reported_with_file_offset_and_key(tmp_path, kind, complaint):
    rec = tmp_path / "a.rec"
    offsets = write_records(rec, [(key, float(key), b"image %d" % key * 10) for key in (10, 11, 12)])
    rec.write_bytes(_damage(bytearray(rec.read_bytes()), offsets[2], kind))
    expected = rf"a\.rec: record at offset {offsets[2]} \(key 12\): {complaint.replace('OFFSET', str(offsets[2]))}"
    with pytest.raises(DataError, match=expected):
        list(RecordReader(rec, tmp_path / "a.idx"))
    with pytest.raises(DataError, match=expected):
        read_headers(rec, *read_index(tmp_path / "a.idx"))


def test_a_multi_part_record_without_its_end_is_reported(tmp_path):
    (tmp_path / "a.rec").write_bytes(framed(payload(0.0, b"abcd"), 1) + framed(payload(1.0, b"next")))
    with pytest.raises(DataError, match=r"record at offset 0: continuation flag 0 at byte 36, expected 2 or 3"):
        list(RecordReader(tmp_path / "a.rec"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.rec: no such record file"):
        RecordReader(tmp_path / "gone.rec")
    with pytest.raises(DataError, match=r"gone\.idx: cannot read the index"):
        read_index(tmp_path / "gone.idx")
