import json
import zlib
from collections import defaultdict

import numpy as np
import pytest

from data_pipeline import duplicates as module
from data_pipeline.duplicates import equal_images
from data_pipeline.pack import Policy, pack
from data_pipeline.recordio import RecordReader, RecordWriter
from tests.unit.record_sets import commented, jpeg

CHECKSUM = [("crc32", "<u4"), ("length", "<u4")]


def with_crc(data, crc32):
    """``data`` with four more bytes, so that its CRC32 is ``crc32``: the CRC is an affine function of those 32 bits."""
    base = zlib.crc32(data + bytes(4))
    rows = [(zlib.crc32(data + (1 << bit).to_bytes(4, "little")) ^ base, 1 << bit) for bit in range(32)]
    for bit in range(32):  # Gaussian elimination over GF(2)
        pivot = next(i for i in range(bit, 32) if rows[i][0] >> bit & 1)
        rows[bit], rows[pivot] = rows[pivot], rows[bit]
        for i in range(32):
            if i != bit and rows[i][0] >> bit & 1:
                rows[i] = (rows[i][0] ^ rows[bit][0], rows[i][1] ^ rows[bit][1])
    wanted, suffix = crc32 ^ base, 0
    for bit in range(32):
        suffix ^= rows[bit][1] if wanted >> bit & 1 else 0
    return data + suffix.to_bytes(4, "little")


def checksums(images):
    return np.array([(zlib.crc32(image), len(image)) for image in images], CHECKSUM)


def brute_force(images):
    groups = defaultdict(list)
    for number, image in enumerate(images):
        if image:
            groups[image].append(number)
    return sorted(group for group in groups.values() if len(group) > 1)


@pytest.mark.parametrize("at_once", [7, 100, 1 << 20])
def test_equal_images_are_those_of_a_brute_force_search(monkeypatch, at_once):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    monkeypatch.setattr(module, "_BLOCK", 64)
    rng = np.random.default_rng(0)
    different = [rng.bytes(rng.integers(1, 4)) for _ in range(150)]  # short ones, so that lengths and bytes coincide often
    images = [different[i] for i in rng.integers(0, 150, 400)] + [b""] * 3
    found = list(equal_images(checksums(images), images.__getitem__))
    assert sorted(found) == brute_force(images)
    assert len(found) > 50
    assert not list(equal_images(checksums([]), images.__getitem__))


def test_different_bytes_with_the_same_checksum_and_length_are_not_equal():
    images = [with_crc(b"image %d" % i, 0x12345678) for i in (1, 2, 3, 1, 4, 2)]
    assert {zlib.crc32(image) for image in images} == {0x12345678}
    assert sorted(equal_images(checksums(images), images.__getitem__)) == [[0, 3], [1, 5]]


@pytest.fixture
def source(tmp_path):
    """One image twice under Ann, one under both Ann and Bo, one twice under Bo and once under Cy; and two with equal CRC32 and length."""
    images = {
        "Ann": {"0": b"a", "1": b"b", "2": b"a", "3": b"shared"},
        "Bo": {"0": b"shared", "1": b"c", "2": b"many", "3": b"many"},
        "Cy": {"0": b"many", "1": b"d"},
    }
    for name, files in images.items():
        (tmp_path / "src" / name).mkdir(parents=True)
        for file, comment in files.items():
            (tmp_path / "src" / name / f"{file}.jpg").write_bytes(commented(jpeg(), comment))
    for file in ("8", "9"):
        (tmp_path / "src" / "Cy" / f"{file}.jpg").write_bytes(with_crc(commented(jpeg(), file.encode()), 99))
    return tmp_path / "src"


def findings(folder):
    """{kind: {image: an equal one}} of the duplicates, paths within the source."""
    found = defaultdict(dict)
    lines = [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]
    for line in [line for line in lines if "equal_to" in line]:
        found[line["kind"]][line["image"].partition("/src/")[2]] = line["equal_to"].partition("/src/")[2]
    return found


SAME = {"Ann/2.jpg": "Ann/0.jpg"}
OTHERS = {
    "Ann/3.jpg": "Bo/0.jpg",
    "Bo/0.jpg": "Ann/3.jpg",
    "Bo/2.jpg": "Cy/0.jpg",
    "Bo/3.jpg": "Cy/0.jpg",
    "Cy/0.jpg": "Bo/2.jpg",
}


def stored(folder):
    return sorted(record.image for shard in folder.glob("*.rec") for record in RecordReader(shard))


def test_duplicates_are_reported_and_packed(source, tmp_path):
    packed = pack([source], tmp_path / "set", 2)
    assert stored(tmp_path / "set") == sorted(path.read_bytes() for path in source.glob("*/*"))
    assert packed.findings == {"same bytes as another image of its identity": 1, "same bytes as an image of another identity": 5}
    assert findings(tmp_path / "set") == dict(zip(packed.findings, ({}, {}), strict=True)) | {
        "same bytes as another image of its identity": SAME,
        "same bytes as an image of another identity": OTHERS,
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_duplicates_are_dropped_on_request(source, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(module, "_LEAST", 5)  # so that there are three jobs
    packed = pack([source], tmp_path / "set", 2, policy=Policy(duplicates="drop"), workers=workers)
    gone = SAME.keys() | OTHERS.keys()
    assert stored(tmp_path / "set") == sorted(path.read_bytes() for path in source.glob("*/*") if str(path.relative_to(source)) not in gone)
    assert packed.findings == {
        "same bytes as another image of its identity, dropped": 1,
        "same bytes as an image of another identity, dropped": 5,
    }
    assert list(findings(tmp_path / "set").values()) in ([SAME, OTHERS], [OTHERS, SAME])


def test_pictures_that_become_equal_are_reported_too(source, tmp_path):
    for name in ("x", "y"):
        (source / "Ann" / f"{name}.jpg").write_bytes(commented(jpeg(side=64), name.encode()))
    packed = pack([source], tmp_path / "set", 2, policy=Policy(wrong_size="resize", duplicates="drop"))
    assert packed.findings["same bytes as another image of its identity"] == 1
    assert findings(tmp_path / "set")["same bytes as another image of its identity"] == {"Ann/y.jpg": "Ann/x.jpg"}


def test_what_cannot_be_read_is_equal_to_nothing(source, tmp_path):
    for name in ("x", "y"):
        (source / "Ann" / f"{name}.jpg").mkdir()
    packed = pack([source], tmp_path / "set", 2, policy=Policy(unreadable="drop", duplicates="drop"))
    assert packed.findings["unreadable, dropped"] == 2
    assert packed.findings["same bytes as another image of its identity, dropped"] == 1


def test_a_stopped_comparison_goes_on_and_sees_what_changed(source, tmp_path, monkeypatch):
    taken = []

    class Counting(module._Checksums):
        def __call__(self, start, count):
            before = self.path(start).stat().st_mtime_ns if self.path(start).exists() else None
            super().__call__(start, count)
            taken.append(self.path(start).stat().st_mtime_ns != before)

    monkeypatch.setattr(module, "_Checksums", Counting)
    monkeypatch.setattr(module, "equal_images", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    drop = {"policy": Policy(duplicates="drop"), "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        pack([source], tmp_path / "set", 2, **drop)
    with pytest.raises(KeyboardInterrupt):
        pack([source], tmp_path / "set", 2, **drop)
    (source / "Ann" / "2.jpg").write_bytes(commented(jpeg(), b"no longer a"))
    monkeypatch.setattr(module, "equal_images", equal_images)
    packed = pack([source], tmp_path / "set", 2, **drop)
    assert taken == [True, False, True]
    assert packed.findings == {"same bytes as an image of another identity, dropped": 5}


def test_shards_with_duplicates_are_not_kept_when_they_are_to_be_dropped(source, tmp_path, monkeypatch):
    for path in source.glob("*/*"):
        if str(path.relative_to(source)) not in SAME | OTHERS:
            path.chmod(0o600)  # of every shard, an image that stays changed last
    pack([source], tmp_path / "whole", 6, policy=Policy(duplicates="drop"))
    write, keys = RecordWriter.write_payload, []

    def stopping(self, key, payload):
        keys.append(key)
        if len(keys) == 11:  # of twelve
            raise KeyboardInterrupt
        return write(self, key, payload)

    monkeypatch.setattr(RecordWriter, "write_payload", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack([source], tmp_path / "set", 6)
    monkeypatch.undo()
    assert len(list(tmp_path.glob(".set.packing/shard_*.json"))) == 5
    pack([source], tmp_path / "set", 6, policy=Policy(duplicates="drop"))
    assert {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()
    }
