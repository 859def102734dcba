"""Damage is written with ``struct`` and byte offsets here; where records lie is read off the framing, not asked of the code under test."""

import io
import json
import re
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from data_pipeline import verify as verify_module
from data_pipeline.__main__ import main
from data_pipeline.errors import DataError
from data_pipeline.field_set import announced_classes
from data_pipeline.jpeg import frame_sizes
from data_pipeline.loader import FaceLoader
from data_pipeline.pack import pack
from data_pipeline.recordio import RecordReader
from data_pipeline.shard_set import open_set
from data_pipeline.verify import verify
from tests.unit.record_sets import MAGIC, field_records, framed, image_folder, jpeg, payload, write_records

IMAGE = 32  # bytes from the start of a record to its image


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A packed set of three shards, and a field set of 2 + 3 + 2 images with header and identity records."""
    root = tmp_path_factory.mktemp("sets")
    pack([image_folder(root / "src", {"Ann": 4, "Bo": 2, "Cy": 5})], root / "packed", 3, seed=1)
    (root / "field").mkdir()
    write_records(root / "field" / "train.rec", field_records([2, 3, 2]), shuffle=3)
    return root


@pytest.fixture
def packed(sets, tmp_path):
    return shutil.copytree(sets / "packed", tmp_path / "packed")


@pytest.fixture
def field(sets, tmp_path):
    return shutil.copytree(sets / "field", tmp_path / "field")


def spans(shard):
    """(start, end of the body) of every record; all are of one part."""
    data, at, found = shard.read_bytes(), 0, []
    while at < len(data):
        (word,) = struct.unpack_from("<I", data, at + 4)
        found.append((at, at + 8 + word))
        at += 8 + word + -word % 4
    return found


def overwrite(path, at, value):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(value)


def flip(path, at):
    overwrite(path, at, bytes([path.read_bytes()[at] ^ 0x55]))


def told(report, root):
    """The findings as text, without the folder."""
    return [str(finding).removeprefix(f"{root}/") for finding in report.findings]


def unfit(report):
    return [(record.shard, record.offset, record.key) for record in report.unfit]


def test_nothing_is_found_in_sound_sets(packed, field):
    for decode in (True, False):
        report = verify(packed, decode=decode)
        assert (report.records, report.images, report.findings) == (11, 11, [])
        report = verify(field, decode=decode)
        assert (report.records, report.images, report.findings) == (11, 7, [])


def test_unusual_records_of_a_field_set_are_sound(tmp_path):
    """Several labels, a PNG, a record in several parts, bytes after the end of an image, a JPEG with fill bytes, a progressive one."""
    png, progressive = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (112, 112)).save(png, "PNG")
    Image.new("L", (112, 112), 99).save(progressive, "JPEG", progressive=True)
    split = jpeg()[:2] + b"\xff\xfe\x00\x0cxx" + MAGIC + b"done" + jpeg()[2:]  # the format's magic number in a comment
    assert split.find(MAGIC) % 4 == 0
    images = [jpeg(), png.getvalue(), jpeg() + bytes(7), jpeg()[:2] + b"\xff\xff" + jpeg()[2:], progressive.getvalue()]
    bodies = [framed(payload([1.0, 0.5], jpeg())), *(framed(payload(0.0, image)) for image in images)]
    bodies.append(framed(payload(1.0, split[:8]), 1) + framed(split[12:], 3))
    offsets = np.cumsum([0, *map(len, bodies)])[:-1]
    (tmp_path / "a.rec").write_bytes(b"".join(bodies))
    (tmp_path / "a.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets)))
    report = verify(tmp_path)
    assert (report.records, report.images, told(report, tmp_path)) == (7, 7, [])


DAMAGE = {  # what is written where (from the record's start; negative: from its body's end), and what is said of it in either layout
    "magic": (0, b"\0", r"magic number 0xced72300 at byte \d+, expected 0xced7230a"),
    "middle of a record": (7, b"\x40", r"continuation flag 2 at byte \d+, expected 0 or 1"),
    "length beyond the file": (4, b"\xff\xff\xff", r"cut short, \d+ of \d+ bytes"),
    "no room for a header": (4, struct.pack("<I", 20), r"20 bytes, less than the 24"),
    "number of labels": (8, struct.pack("<I", 4000), "announces 4000 labels"),
    "start of image": (IMAGE, b"GIF8", "no JPEG: starts with 47494638"),
    "end of image": (-2, b"\0\0", "JPEG is cut short"),
    "label NaN": (12, struct.pack("<f", float("nan")), r"label nan, "),
    "label negative": (12, struct.pack("<f", -1), r"label -1, "),
    "label huge": (12, struct.pack("<f", 1e9), r"label 1e\+09, "),
    "label fractional": (12, struct.pack("<f", 0.5), r"label 0\.5, "),
    "label of no identity": (12, struct.pack("<f", 3), r"label 3, "),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("layout", ["packed", "field"])
def test_damage_to_a_record_is_named_and_nothing_else(packed, field, layout, kind):
    at, value, complaint = DAMAGE[kind]
    folder, shard, i = (packed, packed / "shard_00001.rec", 2) if layout == "packed" else (field, field / "train.rec", 4)
    start, end = spans(shard)[i]
    key = 6 if layout == "packed" else 4
    overwrite(shard, start + at if at >= 0 else end + at, value)
    report = verify(folder)
    assert report.findings
    for finding in report.findings:
        assert str(finding).startswith(f"{shard}: record at offset {start} (key {key}): ")
    assert re.search(complaint, str(report.findings[0] if layout == "field" or "image" not in kind else report.findings[-1]))
    assert unfit(report) == [(shard.name, start, key)]


def test_the_crc_finds_any_flipped_byte_of_an_image(packed):
    shard = packed / "shard_00002.rec"
    start, end = spans(shard)[0]
    sound = shard.read_bytes()
    for at in (start + IMAGE + 3, start + IMAGE + 700, end - 40, end - 1):
        flip(shard, at)
        for decode in (True, False):
            assert re.fullmatch(
                rf"shard_00002\.rec: record at offset {start} \(key 8\): CRC32 [0-9a-f]{{8}}, the set's table says [0-9a-f]{{8}}: .*",
                told(verify(packed, decode=decode), packed)[0],
            )
        shard.write_bytes(sound)


def rewritten(field, key, image):
    """Replace the image of a record of the field set; returns the record's place."""
    records = field_records([2, 3, 2])
    records[key] = (key, records[key][1], image)
    return [("train.rec", write_records(field / "train.rec", records)[key], key)]


def without_chroma_codes():
    """A JPEG whose Huffman table of the chroma's AC codes is another: grey would be decoded as before, if it alone were decoded."""
    data, at = bytearray(jpeg()), 2
    while (data[at + 1], data[at + 4]) != (0xC4, 0x11):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    data[at + 21] ^= 0x33
    return bytes(data)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (jpeg()[:-300] + b"\xff\xd9", "cannot be decoded"),
        (without_chroma_codes(), "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 112, 112) + bytes(80), "cannot be decoded"),
    ],
)
def test_strict_decoding_finds_what_a_look_at_the_markers_does_not(field, image, complaint):
    place = rewritten(field, 3, image)
    assert verify(field, decode=False).findings == []
    report = verify(field)
    assert unfit(report) == place
    assert re.search(complaint, str(report.findings[0]))


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (jpeg(side=128), "an image of 128x128 pixels, expected 112x112"),
        (jpeg().replace(struct.pack(">HH", 112, 112), struct.pack(">HH", 112, 96)), "an image of 96x112 pixels"),
        (jpeg().replace(b"\xff\xc0", b"\xff\xe1"), "JPEG whose markers do not lead to a frame header"),
        (jpeg().replace(b"\xff\xda", b"\xff\xdb"), "JPEG without image data"),
        (jpeg()[:-500], "JPEG is cut short"),
        (b"\0\0" + jpeg()[2:], "no JPEG: starts with 0000ffe0"),
    ],
)
def test_images_without_the_right_markers_are_named_without_decoding(field, image, complaint):
    place = rewritten(field, 3, image)
    report = verify(field, decode=False)
    assert unfit(report) == place
    assert complaint in str(report.findings[0])


@pytest.mark.parametrize("label", [float("nan"), -1.0, 1.5, 1e9])
def test_labels_in_front_of_the_image_count_by_their_first(tmp_path, label):
    offsets = write_records(tmp_path / "a.rec", [(0, [1.0, label], jpeg()), (1, [label, 1.0], jpeg())])
    (line,) = told(verify(tmp_path), tmp_path)
    assert line == f"a.rec: record at offset {offsets[1]} (key 1): label {label:g}, expected a whole number in [0, 16777216)"


def test_a_packed_record_turned_into_labels_is_named(packed):
    shard, (start, end) = next((path, span) for path in packed.glob("*.rec") for span in spans(path) if (span[1] - span[0]) % 4 == 0)
    label = shard.read_bytes()[start + 12 : start + 16]
    overwrite(shard, start + 8, struct.pack("<I", (end - start - IMAGE) // 4))
    overwrite(shard, start + IMAGE, label)
    report = verify(packed)
    assert [line.partition("): ")[2][:5] for line in told(report, packed)] == ["CRC32", "no im"]
    assert [(record.shard, record.offset) for record in report.unfit] == [(shard.name, start)]


def test_stray_bytes_in_a_packed_shard_are_named_though_its_description_counts_them(packed):
    shard, table, sidecar = packed / "shard_00002.rec", np.load(packed / "records.npy"), json.loads((packed / "shards.json").read_text())
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + bytes(4))
    table["length"][-1] += 4
    np.save(packed / "records.npy", table)
    sidecar["shards"][2]["bytes"] += 4
    (packed / "shards.json").write_text(json.dumps(sidecar))
    table_line, record_line = told(verify(packed), packed)
    assert table_line.startswith("records.npy: SHA-256")
    assert record_line.endswith(f"(key 10): ends at byte {size}, the set's table says {size + 4}")


def test_an_image_record_without_an_image_is_named(tmp_path):
    offsets = write_records(tmp_path / "a.rec", [(0, 0.0, jpeg()), (1, 0.0, b"")])
    assert told(verify(tmp_path), tmp_path) == [f"a.rec: record at offset {offsets[1]} (key 1): no image bytes"]


def test_sizes_of_many_frames_are_those_that_pillow_reads():
    rng = np.random.default_rng(0)
    images = []
    for kind in range(30):
        file, size = io.BytesIO(), rng.integers(1, 300, 2).tolist()
        exif = Image.Exif()
        exif[0x010E] = "x" * int(rng.integers(1, 5000))
        options = [{}, {"progressive": True}, {"exif": exif}, {"comment": b"\xff\xc0" * 9}, {"subsampling": 2, "optimize": True}][kind % 5]
        Image.new("RGB", size).save(file, "JPEG", **options)
        images.append(file.getvalue())
    ends = np.cumsum([len(image) for image in images])
    sizes = frame_sizes(np.frombuffer(b"".join(images), np.uint8), np.append(0, ends[:-1]), ends)
    assert [tuple(size) for size in sizes.tolist()] == [Image.open(io.BytesIO(image)).size for image in images]
    cut = np.frombuffer(images[0][:60], np.uint8)
    assert frame_sizes(cut, np.array([0]), np.array([60])).tolist() == [[0, 0]]


def test_a_length_that_swallows_the_next_record_is_told_from_an_index_that_points_into_a_record(field):
    places, index = spans(field / "train.rec"), field / "train.idx"
    index.write_text(index.read_text() + f"99\t{places[3][0] + 400}\n")
    report = verify(field)
    assert unfit(report) == [("train.rec", places[3][0] + 400, 99)]
    assert "magic number" in str(report.findings[0])
    overwrite(field / "train.rec", places[2][0] + 4, struct.pack("<I", places[3][1] - places[2][0] - 8))
    first, second = told(verify(field), field)
    assert f"(key 2): ends at byte {places[4][0]}, but the next record starts at {places[3][0]}: its length is damaged" in first
    assert "(key 99)" in second


def test_a_length_that_is_too_short_is_told_by_the_image_alone(field):
    start, end = spans(field / "train.rec")[3]
    overwrite(field / "train.rec", start + 4, struct.pack("<I", end - start - 8 - 40))
    assert [line.partition("): ")[2][:17] for line in told(verify(field, decode=False), field)] == ["JPEG is cut short"]


def test_index_lines_that_point_into_records_are_named_and_the_records_stay_sound(tmp_path):
    image = jpeg()[:2] + b"\xff\xfe\x00\x0cxx" + MAGIC + b"done" + jpeg()[2:]  # the format's magic number in a comment
    first = framed(payload(0.0, image[:8]), 1)
    body = first + framed(image[12:], 3)
    (tmp_path / "a.rec").write_bytes(body + framed(payload(1.0, jpeg())))
    (tmp_path / "a.idx").write_text(f"0\t0\n8\t{len(first)}\n1\t{len(body)}\n9\t{len(body) + 1}\n")
    report = verify(tmp_path)
    assert unfit(report) == [("a.rec", len(first), 8), ("a.rec", len(body) + 1, 9)]
    middle, shifted = told(report, tmp_path)
    assert "continuation flag 3" in middle
    assert "magic number" in shifted
    main(["verify", str(tmp_path)])
    loader = FaceLoader(tmp_path, 2, num_threads=1)
    assert sorted(next(loader).labels.tolist()) == [0, 1]
    assert loader.bad_records == {}


def test_an_index_line_that_is_a_byte_off_is_named_even_of_a_record_without_an_image(field):
    start = spans(field / "train.rec")[9][0]
    lines = dict(line.split() for line in (field / "train.idx").read_text().splitlines())
    del lines["10"]
    lines["9"] = str(start + 1)
    (field / "train.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in lines.items()))
    assert unfit(verify(field)) == [("train.rec", start + 1, 9)]


def test_a_file_that_ends_without_the_last_padding_is_sound(tmp_path):
    image = jpeg() + bytes(-len(jpeg()) % 4 + 1)
    write_records(tmp_path / "a.rec", [(0, 0.0, jpeg()), (1, 1.0, image)])
    body = (tmp_path / "a.rec").read_bytes()
    (tmp_path / "a.rec").write_bytes(body[:-3])
    assert verify(tmp_path).findings == []
    loader = FaceLoader(tmp_path, 2, num_threads=1)
    assert sorted(next(loader).labels.tolist()) == [0, 1]
    assert loader.bad_records == {}


def test_a_truncated_field_set_is_told_record_by_record(field):
    places, rec = spans(field / "train.rec"), field / "train.rec"
    rec.write_bytes(rec.read_bytes()[: places[6][0] + 100])
    report = verify(field)
    assert unfit(report) == [("train.rec", start, key) for key, (start, _) in enumerate(places)][6:]
    lines = told(report, field)
    assert f"record at offset {places[6][0]} (key 6): cut short, 92 of " in lines[0]
    assert f"record at offset {places[7][0]} (key 7): nothing at byte {places[7][0]}" in lines[1]


def test_a_truncated_or_missing_shard_of_a_packed_set_is_named(packed):
    shard = packed / "shard_00001.rec"
    places = spans(shard)
    shard.write_bytes(shard.read_bytes()[: places[2][0] + 60])
    report = verify(packed)
    assert re.fullmatch(r"shard_00001\.rec: \d+ bytes, the sidecar says \d+; .*", told(report, packed)[0])
    assert unfit(report) == [("shard_00001.rec", places[2][0], 6), ("shard_00001.rec", places[3][0], 7)]
    shard.unlink()
    report = verify(packed)
    assert (report.records, len(report.findings), unfit(report)) == (7, 1, [])
    assert str(report.findings[0]) == f"{shard}: the sidecar lists this shard, but it is missing; copy it again or pack the set again"


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda lines: [*lines[:4], "img\t0", *lines[5:]], "line 5: expected `key<TAB>offset`, two whole numbers, found 'img"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], r"line 1: '1\\t\d+', the set's table says '0\\t0'; pack the set again"),
        (lambda lines: [*lines[:4], lines[3], *lines[4:]], r"line 5: '3\\t\d+', the set's table says '4\\t\d+'"),
        (lambda lines: lines[:-1], "lists 10 records, the sidecar says 11"),
        (lambda lines: [*lines, ""], "SHA-256 [0-9a-f]{64}, the sidecar says [0-9a-f]{64}: it changed"),
        (None, "cannot read the index: No such file"),
    ],
)
def test_a_changed_index_of_a_packed_set_is_a_finding_and_the_records_are_read_all_the_same(packed, edit, complaint):
    index = packed / "shards.idx"
    index.unlink() if edit is None else index.write_text("\n".join(edit(index.read_text().splitlines())) + "\n")
    report = verify(packed)
    (line,) = told(report, packed)
    assert re.match(f"shards.idx: {complaint}", line)
    assert (report.records, report.images, report.unfit) == (11, 11, [])


def test_changed_descriptions_of_a_packed_set_are_findings(packed):
    (packed / "identities.json").write_text('["Ann", "Bo", "Di"]')
    table = np.load(packed / "records.npy")
    table["label"][5] = 9
    np.save(packed / "records.npy", table)
    lines = told(verify(packed), packed)
    start = spans(packed / "shard_00001.rec")[1][0]
    assert lines[0].startswith("records.npy: labels beyond the 3 identities: 1; ")
    assert lines[1].startswith("identities.json: SHA-256 ")
    assert re.fullmatch(rf"shard_00001\.rec: record at offset {start} \(key 5\): label \d, the set's table says 9", lines[2])
    (packed / "shards.json").write_text("{")
    with pytest.raises(DataError, match=r"shards\.json: not a readable sidecar"):
        verify(packed)


@pytest.mark.parametrize("edit", ["gone", "other", "places", "counts"])
def test_without_a_usable_table_the_shards_are_read_in_file_order(packed, edit):
    path, shard = packed / "records.npy", packed / "shard_00001.rec"
    table = np.load(path)
    if edit == "gone":
        path.unlink()
    elif edit == "other":
        np.save(path, table["label"])
    elif edit == "places":
        table["offset"][5] += 4
        np.save(path, table)
    else:
        sidecar = json.loads((packed / "shards.json").read_text())
        sidecar["shards"][0]["records"], sidecar["shards"][1]["records"] = 3, 5
        (packed / "shards.json").write_text(json.dumps(sidecar))
    places = spans(shard)
    overwrite(shard, places[1][0], b"\0")
    overwrite(shard, places[2][0] + 12, struct.pack("<f", 7))
    report = verify(packed)
    of_file, damaged, label = (line for line in told(report, packed) if not line.startswith("shards.idx"))
    assert of_file.startswith("records.npy: ")
    assert damaged.startswith(f"shard_00001.rec: record at offset {places[1][0]}: magic number")
    assert damaged.endswith(f"; bytes {places[1][0]} to {places[2][0]} hold no record that can be read")
    assert label == f"shard_00001.rec: record at offset {places[2][0]} (key 6): label 7, expected a whole number in [0, 3)"
    assert (report.records, report.images) == (10, 10)


def test_a_field_set_without_a_readable_index_is_read_in_file_order(field):
    index, places = field / "train.idx", spans(field / "train.rec")
    index.write_text("0\t0\nx\ty\n")
    flip(field / "train.rec", places[2][1] - 1)
    report = verify(field)
    assert told(report, field) == [
        "train.idx: line 2: expected `key<TAB>offset`, two whole numbers, found 'x\\ty'",
        f"train.rec: record at offset {places[2][0]} (key 2): JPEG is cut short (no end marker ffd9 after the image data)",
    ]
    assert (report.records, report.images) == (11, 7)
    rec = field / "train.rec"
    rec.write_bytes(rec.read_bytes()[: places[3][0] + 30])
    assert told(verify(field), field)[-1].endswith(f"bytes {places[3][0]} to {places[3][0] + 30} hold no record that can be read")


def test_bytes_that_no_index_line_reaches_are_named(tmp_path):
    offsets = write_records(tmp_path / "train.rec", [(key, 0.0, jpeg()) for key in range(5)])
    size = (tmp_path / "train.rec").stat().st_size
    with open(tmp_path / "train.rec", "ab") as file:
        file.write(b"more")
    (tmp_path / "train.idx").write_text(f"1\t{offsets[1]}\n2\t{offsets[2]}\n4\t{offsets[4]}\n")
    report = verify(tmp_path)
    assert told(report, tmp_path) == [
        f"train.rec: record at offset {offsets[1]} (key 1): bytes 0 to {offsets[1]} before it hold a record that the index does not list: "
        "make the index again",
        f"train.rec: record at offset {offsets[2]} (key 2): bytes {offsets[3]} to {offsets[4]} after it hold a record that the index does "
        "not list: make the index again",
        f"train.rec: record at offset {offsets[4]} (key 4): bytes {size} to {size + 4} after it belong to no record",
    ]
    assert report.unfit == []


def test_index_lines_that_stand_twice_are_named(tmp_path):
    offsets = write_records(tmp_path / "train.rec", [(key, 0.0, jpeg()) for key in range(3)])
    index = tmp_path / "train.idx"
    index.write_text(2 * index.read_text() + f"1\t{offsets[2]}\n")
    offset, key = told(verify(tmp_path), tmp_path)
    assert offset == (
        "train.rec: record at offset 0 (key 0): the index lists its offset again ('0\\t0' and '0\\t0'), and so with 3 other lines: "
        "make the index again"
    )
    assert "(key 0): the index lists its key again" in key
    with pytest.raises(DataError, match="lists offset 0 more than once"):
        open_set(tmp_path)


def test_the_counts_of_the_header_record_are_compared(field):
    places, index = spans(field / "train.rec"), field / "train.idx"
    lines = [line for line in index.read_text().splitlines() if line.split()[0] not in ("7", "10")]  # an image and an identity record
    index.write_text("\n".join(lines))
    found = told(verify(field), field)
    header = "train.rec: record at offset 0 (key 0): the header announces "
    assert found[:2] == [
        f"{header}7 image records, 6 can be read; 0 records cannot",
        f"{header}3 identity records, 2 can be read; 0 records cannot",
    ]
    assert f"bytes {places[7][0]} to {places[8][0]} after it hold a record" in found[2]
    assert open_set(field).num_classes == 3


def test_a_header_record_that_stands_last_announces_the_classes_and_the_counts(tmp_path):
    """As in files that were merged."""
    header, *rest = field_records([2, 3, 0])
    write_records(tmp_path / "train.rec", [*rest, header])
    assert not verify(tmp_path).findings
    places, index = spans(tmp_path / "train.rec"), tmp_path / "train.idx"
    index.write_text("\n".join(line for line in index.read_text().splitlines() if line.split()[0] != "2"))
    assert f"train.rec: record at offset {places[-1][0]} (key 0): the header announces 5 image records, 4 can be read" in "\n".join(
        told(verify(tmp_path), tmp_path)
    )


def test_an_index_whose_keys_are_permuted_is_named_by_its_header(field):
    index = field / "train.idx"
    lines = dict(line.split() for line in index.read_text().splitlines())
    lines["0"], lines["5"] = lines["5"], lines["0"]
    index.write_text("".join(f"{key}\t{offset}\n" for key, offset in lines.items()))
    (line,) = told(verify(field), field)
    assert line.startswith("train.rec: record at offset 0 (key 5): holds labels alone, as the header record does, whose key is 0")


def test_keys_beyond_32_bits_are_refused_and_the_file_is_read_all_the_same(field):
    index = field / "train.idx"
    index.write_text(index.read_text() + f"{1 << 32}\t0\n")
    report = verify(field)
    assert told(report, field) == ["train.idx: key 4294967296, expected less than 2^32; make the index again"]
    assert report.records == 11


def test_what_the_disk_cannot_read_is_named(packed, monkeypatch):
    start = spans(packed / "shard_00001.rec")[1][0]
    read_at = RecordReader.read_at

    def failing(*_):
        raise OSError(5, "Input/output error")

    def failing_at_one(reader, offset, key=None):
        return failing() if (reader.path.name, offset) == ("shard_00001.rec", start) else read_at(reader, offset, key)

    monkeypatch.setattr(RecordReader, "read_bytes", failing)
    monkeypatch.setattr(RecordReader, "read_at", failing_at_one)
    report = verify(packed)
    assert told(report, packed) == [f"shard_00001.rec: record at offset {start} (key 5): cannot be read (Input/output error)"]
    assert report.images == 10


def test_several_processes_and_small_pieces_find_the_same(packed, field, monkeypatch):
    for number, i in ((0, 3), (1, 2), (2, 0)):
        shard = packed / f"shard_0000{number}.rec"
        flip(shard, spans(shard)[i][0] + 300)
    rec = field / "train.rec"
    for i, at in ((1, 300), (6, 12)):
        flip(rec, spans(rec)[i][0] + at)
    expected = {folder: verify(folder, workers=1) for folder in (packed, field)}
    assert [record.shard for record in expected[packed].unfit] == [f"shard_0000{number}.rec" for number in range(3)]
    assert [record.key for record in expected[field].unfit][-1] == 6
    monkeypatch.setattr(verify_module, "_JOB", 2)
    monkeypatch.setattr("data_pipeline.record_checks._WINDOW", 100)
    assert {folder: verify(folder, workers=1) for folder in expected} == expected
    assert verify(packed, workers=2) == expected[packed]
    with pytest.raises(DataError, match="--workers 0: must be at least 1"):
        verify(packed, workers=0)


@pytest.mark.parametrize("layout", ["packed", "field"])
def test_the_loader_leaves_out_what_verify_puts_in_quarantine(packed, field, layout, capsys):
    folder, shard = (packed, packed / "shard_00001.rec") if layout == "packed" else (field, field / "train.rec")
    places = spans(shard)
    overwrite(shard, places[1][0], b"\0")
    overwrite(shard, places[2][1] - 2, b"\0\0")
    bad = {f"{shard.name} offset {places[i][0]} (key {key})" for i, key in ((1, 5), (2, 6)) if layout == "packed"} or {
        f"{shard.name} offset {places[i][0]} (key {i})" for i in (1, 2)
    }
    if layout == "field":
        with pytest.raises(DataError, match="magic number"):
            open_set(folder)
    everything = (11 if layout == "packed" else 7) - len(bad)
    assert main(["verify", str(folder)]) == 1
    listed = folder / "quarantine.jsonl" if layout == "packed" else folder / "train.quarantine.jsonl"
    assert f"2 records put in quarantine: {listed}; the loader leaves them out" in capsys.readouterr().out
    for backend in ("table", "reader"):
        loader = FaceLoader(folder, 1, backend=backend, num_threads=1)
        assert (loader.num_images, loader.num_classes) == (everything, 3)
        seen = [name for _ in range(2 * everything) for name in next(loader).records()]
        assert len(set(seen)) == everything
        assert not bad & set(seen)
        assert loader.bad_records == {}
    assert main(["verify", str(folder)]) == 1  # reads those in quarantine, too
    assert len(listed.read_text().splitlines()) == 3


def test_damaged_header_and_identity_records_cost_no_class(field):
    places = spans(field / "train.rec")
    overwrite(field / "train.rec", places[8][0], b"\0")
    for damaged in ([8], [8, 0]):
        overwrite(field / "train.rec", places[damaged[-1]][0], b"\0")
        main(["verify", str(field)])
        assert unfit(verify(field)) == [("train.rec", places[i][0], i) for i in sorted(damaged)]
        faces = open_set(field)
        assert (faces.num_images, faces.num_classes) == (7, 3)


def test_classes_beyond_what_float32_counts_are_the_identity_records_read_or_not():
    header, others = (float(1 << 25), float((1 << 25) + 8)), np.array([0, 900, 940, 980])
    assert announced_classes(header, others, np.array([], np.int64)) == 3
    assert announced_classes(header, others, np.array([500, 920, 1020])) == 5  # 500 was an image
    assert announced_classes((5.0, 9.0), others, np.array([920])) == 4
    assert announced_classes(None, others, np.array([])) is None


def test_a_quarantine_of_another_set_is_refused_with_both_sizes(field):
    rec = field / "train.rec"
    overwrite(rec, spans(rec)[1][1] - 2, b"\0\0")
    main(["verify", str(field)])
    size = rec.stat().st_size
    with open(rec, "ab") as file:
        file.write(bytes(4))
    with pytest.raises(DataError, match=rf"train\.quarantine\.jsonl: is of another set: train\.rec has {size + 4} bytes here, {size} in"):
        open_set(field)


def test_the_quarantine_follows_what_is_found(packed, capsys):
    shard, listed = packed / "shard_00000.rec", packed / "quarantine.jsonl"

    def run(*options):
        code = main(["verify", str(packed), *options])
        return code, capsys.readouterr().out

    flip(shard, 500)
    assert run("--no-quarantine")[0] == 1
    assert not listed.exists()
    assert run("--no-decode")[0] == 1
    first, record = map(json.loads, listed.read_text().splitlines())
    assert first["shards"] == {path.name: path.stat().st_size for path in packed.glob("*.rec")}
    assert (record["shard"], record["offset"], record["key"], record["problem"][:5]) == ("shard_00000.rec", 0, 0, "CRC32")
    flip(shard, 500)
    assert run("--no-quarantine")[0] == 0
    assert listed.exists()
    code, out = run()
    assert (code, listed.exists()) == (0, False)
    assert f"the quarantine list of an earlier run is removed: {listed}" in out
    assert run() == (0, f"{packed}: 11 records read, 11 images, 0 findings\n")


def test_no_decode_does_not_decode(field, capsys):
    rewritten(field, 3, jpeg()[:-300] + b"\xff\xd9")
    assert main(["verify", str(field), "--no-decode"]) == 0
    assert main(["verify", str(field)]) == 1
    assert "(key 3): cannot be decoded" in capsys.readouterr().out


def test_a_quarantine_that_cannot_be_written_is_told_and_the_exit_code_stays(packed, capsys):
    flip(packed / "shard_00000.rec", 500)
    (packed / "quarantine.jsonl").mkdir()  # as good as a folder that cannot be written, for root too
    assert main(["verify", str(packed)]) == 1
    assert f"{packed / 'quarantine.jsonl'}: the quarantine list cannot be written (Is a directory)" in capsys.readouterr().out


def test_findings_beyond_the_first_fifty_are_counted_and_all_are_listed(tmp_path, capsys):
    write_records(tmp_path / "train.rec", [(key, float(key % 2), b"no image") for key in range(60)] + [(60, 0.0, jpeg())])
    (tmp_path / "train.idx").write_text((tmp_path / "train.idx").read_text() + "61\t0\n")
    assert main(["verify", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("no JPEG" in line for line in lines) == 49
    assert lines[-4:] == [
        "... and 11 more",
        f"60 records put in quarantine: {tmp_path / 'train.quarantine.jsonl'}; the loader leaves them out",
        "quarantine does not help against 1 of the findings, which are of files or of places between records: mend them",
        f"{tmp_path}: 61 records read, 61 images, 61 findings",
    ]
    assert len((tmp_path / "train.quarantine.jsonl").read_text().splitlines()) == 61


@pytest.mark.faces
def test_of_real_faces_strict_decoding_finds_some_flipped_bytes_and_the_crc_all(faces, tmp_path):
    rng = np.random.default_rng(0)
    folders = sorted((faces / "lfw_112").iterdir())[:150]
    for folder in folders:
        shutil.copytree(folder, tmp_path / "src" / folder.name)
    pack([tmp_path / "src"], tmp_path / "packed", 1)
    shard = tmp_path / "packed" / "shard_00000.rec"
    assert verify(tmp_path / "packed").findings == []
    places = spans(shard)
    for start, end in places:
        flip(shard, int(rng.integers(start + IMAGE, end)))
    assert len(verify(tmp_path / "packed", decode=False).unfit) == len(places)
    (tmp_path / "packed" / "train.idx").write_text("".join(f"{key}\t{start}\n" for key, (start, _) in enumerate(places)))
    found = len(verify(shard.rename(tmp_path / "packed" / "train.rec")).unfit) / len(places)
    assert 0.2 < found < 0.6
