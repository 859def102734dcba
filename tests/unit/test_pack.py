import errno
import fcntl
import hashlib
import io
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import sources
from data_pipeline.errors import DataError
from data_pipeline.loader import FaceLoader
from data_pipeline.pack import Policy, pack
from data_pipeline.recordio import RecordReader, RecordWriter, read_index
from data_pipeline.shard_set import open_set
from data_pipeline.sources import read_identities
from tests.unit.record_sets import MAGIC, commented, image_folder, jpeg, label_of

PEOPLE = {"Ann": 4, "Bo": 2, "Cy": 5}
FILES = ["identities.json", "records.npy", "shard_00000.rec", "shard_00001.rec", "shards.idx", "shards.json"]


@pytest.fixture
def source(tmp_path):
    return image_folder(tmp_path / "src", PEOPLE)


@pytest.fixture
def packed(source, tmp_path):
    pack([source], tmp_path / "set", 3, seed=1)
    return tmp_path / "set"


@pytest.fixture
def crowd(tmp_path):
    """200 images of 10 identities, every one with bytes of its own."""
    plain = jpeg()
    for label in range(10):
        (tmp_path / f"crowd/{label:02d}").mkdir(parents=True)
        for k in range(20):
            (tmp_path / f"crowd/{label:02d}/{k:02d}.jpg").write_bytes(commented(plain, b"%d %d" % (label, k)))
    return tmp_path / "crowd"


def records_of(folder):
    """(label, image) of every record, shard after shard, and where the index must find them."""
    found, offsets, base = [], [], 0
    for shard in sorted(folder.glob("shard_*.rec")):
        for record in RecordReader(shard):
            found.append((record.labels[0], record.image))
            offsets.append(base + record.offset)
        base += shard.stat().st_size
    return found, offsets


def labelled(source, pattern="*"):
    """(label, bytes) of every file of an image folder whose name fits."""
    names = sorted(entry.name for entry in source.iterdir())
    return [(float(label), file.read_bytes()) for label, name in enumerate(names) for file in sorted((source / name).glob(pattern))]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def written(folder):
    """Which file each shard is, and when it was written last."""
    return {shard.name: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in folder.glob("*.rec")}


def findings(folder):
    return [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]


def test_jpeg_files_are_stored_byte_for_byte_under_the_labels_of_sorted_identities(source, packed):
    found, offsets = records_of(packed)
    assert sorted(found) == sorted(labelled(source))
    keys, indexed = read_index(packed / "shards.idx")
    assert (keys.tolist(), indexed.tolist()) == (list(range(11)), offsets)


def test_the_table_says_place_label_and_checksum_of_every_record(packed):
    found, offsets = records_of(packed)
    table = np.load(packed / "records.npy")
    ends = [*offsets[1:], sum(shard.stat().st_size for shard in packed.glob("*.rec"))]
    assert table["offset"].tolist() == offsets
    assert (table["offset"] + table["length"]).tolist() == ends
    assert table["key"].tolist() == list(range(11))
    assert table["label"].tolist() == [label for label, _ in found]
    assert table["crc32"].tolist() == [zlib.crc32(image) for _, image in found]


def test_the_sidecar_describes_the_set(packed):
    sidecar = json.loads((packed / "shards.json").read_text())
    assert {name: sidecar[name] for name in ("format_version", "num_images", "num_classes", "seed")} == {
        "format_version": 2,
        "num_images": 11,
        "num_classes": 3,
        "seed": 1,
    }
    assert sidecar["shards"] == [
        {"name": f"shard_0000{i}.rec", "bytes": (packed / f"shard_0000{i}.rec").stat().st_size, "records": records}
        for i, records in enumerate((4, 4, 3))
    ]
    assert json.loads((packed / "identities.json").read_text()) == ["Ann", "Bo", "Cy"]
    others = ("identities.json", "records.npy", "shards.idx")
    assert sidecar["sha256"] == {name: hashlib.sha256((packed / name).read_bytes()).hexdigest() for name in others}


def test_the_bytes_depend_on_source_and_seed_alone_whatever_the_number_of_workers(crowd, tmp_path):
    pack([crowd], tmp_path / "one", 7, seed=1, workers=1)
    pack([crowd], tmp_path / "three", 7, seed=1, workers=3)
    pack([crowd], tmp_path / "other", 7, seed=2)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    one, other = records_of(tmp_path / "one")[0], records_of(tmp_path / "other")[0]
    assert sorted(one) == sorted(other) == sorted(labelled(crowd))
    assert one != other


def test_images_are_shuffled_over_all_shards(crowd, tmp_path):
    pack([crowd], tmp_path / "set", 4)
    place = {image: i for i, (_, image) in enumerate(labelled(crowd))}
    order = np.array([place[image] for _, image in records_of(tmp_path / "set")[0]])
    assert abs(np.corrcoef(np.arange(200), order)[0, 1]) < 0.25  # three and a half standard deviations of a random order
    assert (np.diff(order) == 1).sum() < 8  # neighbours of the source that stayed together: one is to be expected
    for quarter in np.split(order, 4):  # of 50 images: 5 of each identity are to be expected
        assert len(set(quarter // 20)) >= 7
        assert np.bincount(quarter // 20).max() <= 13


def test_other_formats_are_encoded_once_close_to_the_original(tmp_path):
    (tmp_path / "src" / "Ann").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (14, 14, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(tmp_path / "src" / "Ann" / "0.png")
    pack([tmp_path / "src"], tmp_path / "set", 1)
    ((_, stored),), _ = records_of(tmp_path / "set")
    with Image.open(io.BytesIO(stored)) as image:
        assert (image.format, image.layer[1][1:3]) == ("JPEG", (1, 1))  # chroma is not subsampled
        assert np.abs(np.asarray(image, int) - pixels).mean() < 3


def test_only_the_listed_identities_are_packed(source, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"train": ["Cy", "Ann"], "test": ["Bo"]}))
    pack([source], tmp_path / "set", 2, identities=read_identities(tmp_path / "split.json", "train"))
    faces = open_set(tmp_path / "set")
    assert (faces.identities(), faces.images_per_class.tolist()) == (["Ann", "Cy"], [4, 5])


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
        pack([source], tmp_path / "set", 1, identities=read_identities(listed, "train"))
    with pytest.raises(DataError, match="--identities: chooses among the folders of one folder"):
        pack([source, source], tmp_path / "set", 1, identities=["Ann"])
    listed.write_text("[1")
    with pytest.raises(DataError, match=r"ids\.json: cannot be read as JSON"):
        read_identities(listed, None)


def test_bad_sources_are_refused_by_name_and_leave_nothing(source, tmp_path):
    def refused(complaint, shards=2, folder=source, **options):
        with pytest.raises(DataError, match=complaint):
            pack([folder], tmp_path / "out" / "set", shards, **options)
        assert not list(tmp_path.glob("out/*"))
        assert not list(tmp_path.glob("out/.*"))

    refused("gone: no such folder", folder=tmp_path / "gone")
    refused(r"--shards 12: must lie in \[1, 11\]", shards=12)
    refused(r"--shards 0: must lie in", shards=0)
    refused("--seed -1: must be at least 0", seed=-1)
    refused("--workers 0: must be at least 1", workers=0)
    (tmp_path / "hollow").mkdir()
    refused("hollow: no images", folder=tmp_path / "hollow")
    (source / "Dee").mkdir()
    refused("1 of 4 identities have no image, the first: 'Dee'")
    (source / "Dee" / "0.jpg").write_bytes(jpeg()[:-40])
    refused(r"Dee/0\.jpg: JPEG is cut short .*--unreadable drop", shards=1)
    (source / "Dee" / "0.jpg").write_bytes(b"hello")
    refused(r"Dee/0\.jpg: cannot be read as an image: its format is not known; mend it", shards=1)
    (source / "Dee" / "0.jpg").write_bytes(b"")
    refused(r"Dee/0\.jpg: cannot be read as an image: its format is not known", shards=1)
    png = io.BytesIO()
    Image.new("RGB", (112, 112)).save(png, "PNG")
    (source / "Dee" / "0.jpg").write_bytes(png.getvalue().replace(b"IDAT", b"I\0AT"))  # Pillow raises SyntaxError
    refused(r"Dee/0\.jpg: cannot be read as an image", shards=1)
    (source / "Dee" / "0.jpg").write_bytes(b"P6 -1 112 255 ")  # Pillow raises ValueError
    refused(r"Dee/0\.jpg: cannot be read as an image", shards=1)
    Image.fromarray(np.full((112, 112), 30000, np.uint16)).save(source / "Dee" / "0.jpg", "PNG")
    refused(r"Dee/0\.jpg: holds more than 8 bits per pixel and channel", shards=1)
    (source / "Dee" / "0.jpg").unlink()
    (source / "Dee" / "0.jpg").mkdir()
    refused(r"Dee/0\.jpg: cannot be read \(Is a directory\); mend it", shards=1)
    (source / "Dee" / "0.jpg").rmdir()
    (source / "Dee" / "0.jpg").write_bytes(jpeg(side=128))
    refused(r"Dee/0\.jpg: an image of 128x128 pixels, expected 112x112\. Align and crop .* --wrong-size drop or resize", shards=1)


def test_more_identities_than_labels_can_count_are_refused_before_any_folder_is_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_CLASSES", 2)
    monkeypatch.setattr(sources.os, "listdir", lambda path: pytest.fail("read a folder"))
    with pytest.raises(DataError, match="src: 3 identities; labels are float32 in the records, which counts to 2"):
        pack([source], tmp_path / "set", 1)
    monkeypatch.undo()
    monkeypatch.setattr(sources, "MAX_CLASSES", 5)
    with pytest.raises(DataError, match=r"src, .*src: 6 identities; "):
        pack([source, source], tmp_path / "set", 1)


def test_names_need_not_be_text(tmp_path):
    odd = [b"two words", "Zoë".encode(), "李".encode(), b"no\xfftext", b"a\tb\\c'\"", b"new\nline"]
    for k, name in enumerate(odd):
        folder = os.fsencode(tmp_path / "src") + b"/" + name
        os.makedirs(folder)
        Path(os.fsdecode(folder + b"/\xfe \n.jpg")).write_bytes(commented(jpeg(), b"%d" % k))
    pack([tmp_path / "src"], tmp_path / "set", 1)
    names = open_set(tmp_path / "set").identities()
    assert {os.fsencode(names[int(label)]): image for label, image in records_of(tmp_path / "set")[0]} == {
        name: commented(jpeg(), b"%d" % k) for k, name in enumerate(odd)
    }


def test_an_existing_output_is_kept_unless_forced(source, packed):
    before = contents(packed)
    with pytest.raises(DataError, match="set: exists already; give --force"):
        pack([source], packed, 2)
    assert contents(packed) == before
    pack([source], packed, 2, force=True)
    assert sorted(contents(packed)) == FILES
    assert not list(packed.parent.glob(".*"))


def test_force_deletes_nothing_but_a_set(source, packed):
    (packed / "thesis.tex").write_text("years of work")
    before = contents(packed)
    with pytest.raises(DataError, match=r"holds 'thesis\.tex', which is no part of such an output"):
        pack([source], packed, 2, force=True)
    assert contents(packed) == before


def test_force_through_a_symbolic_link_replaces_what_it_points_to(source, packed):
    link = packed.parent / "link"
    link.symlink_to(packed)
    pack([source], link, 2, force=True)
    assert link.is_symlink()
    assert sorted(contents(packed)) == FILES
    assert not list(packed.parent.glob(".*"))


def test_a_set_can_be_packed_anew_in_its_own_place(packed):
    before = records_of(packed)[0]
    pack([packed], packed, 2, seed=5, force=True)
    after = records_of(packed)[0]
    assert sorted(contents(packed)) == FILES
    assert after != before
    assert sorted(after) == sorted(before)


def test_a_mount_point_is_refused_before_the_work(source):
    with pytest.raises(DataError, match="/: is a mount point"):
        pack([source], Path("/"), 1)


def test_a_stop_between_the_two_renames_keeps_the_old_set(source, packed, monkeypatch):
    before = contents(packed)
    replace = os.replace

    def stopping(old, new):
        replace(old, new)
        if Path(old) == packed:
            raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.output.os.replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack([source], packed, 2, force=True)
    assert contents(packed) == before


def failing_at(monkeypatch, number, error):
    """The ``number``-th record that is written, from 1, raises ``error``."""
    write, calls = RecordWriter.write_payload, []

    def failing(self, key, payload):
        calls.append(key)
        if len(calls) == number:
            raise error
        return write(self, key, payload)

    monkeypatch.setattr(RecordWriter, "write_payload", failing)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(errno.ENOSPC, "No space left on device")])
def test_a_pack_stopped_before_a_shard_is_finished_leaves_nothing_and_keeps_the_old_set(source, packed, monkeypatch, error):
    before = contents(packed)
    for out, force in ((packed, True), (packed.parent / "fresh", False)):
        failing_at(monkeypatch, 3, error)
        with pytest.raises((type(error), DataError)):
            pack([source], out, 2, force=force)
        monkeypatch.undo()
    assert contents(packed) == before
    assert sorted(entry.name for entry in packed.parent.iterdir()) == ["set", "src"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(errno.ENOSPC, "No space left on device")])
def test_a_stopped_pack_goes_on_from_its_finished_shards(crowd, tmp_path, monkeypatch, error):
    pack([crowd], tmp_path / "whole", 5)
    failing_at(monkeypatch, 90, error)
    with pytest.raises(type(error) if not isinstance(error, OSError) else DataError) as caught:
        pack([crowd], tmp_path / "set", 5)
    if isinstance(error, OSError):
        assert str(caught.value).endswith("/.set.packing/shard_00002.part: No space left on device")
    monkeypatch.undo()
    folder = tmp_path / ".set.packing"
    assert not (tmp_path / "set").exists()
    assert not list(folder.glob("*.part"))
    finished = written(folder / "set")
    assert sorted(finished) == ["shard_00000.rec", "shard_00001.rec"]
    pack([crowd], tmp_path / "set", 5)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert finished.items() <= written(tmp_path / "set").items()
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def stopped(crowd, tmp_path, monkeypatch):
    """A pack of ``crowd`` into ``tmp_path / "set"``, five shards, stopped after two."""
    failing_at(monkeypatch, 90, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pack([crowd], tmp_path / "set", 5)
    monkeypatch.undo()
    return written(tmp_path / ".set.packing/set")


def kept(tmp_path, before):
    """Which of the first two shards are the files that the stopped pack wrote."""
    return [written(tmp_path / "set")[name] == before[name] for name in ("shard_00000.rec", "shard_00001.rec")]


@pytest.mark.parametrize("change", ["seed", "shards", "an image more", "another source"])
def test_another_plan_starts_anew(crowd, tmp_path, stopped, change):
    arguments = {"seed": 1} if change == "seed" else {}
    shards = 4 if change == "shards" else 5
    if change == "an image more":
        (crowd / "03" / "more.jpg").write_bytes(jpeg())
    folder = crowd.rename(tmp_path / "moved") if change == "another source" else crowd
    pack([folder], tmp_path / "whole", shards, **arguments)
    pack([folder], tmp_path / "set", shards, **arguments)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert kept(tmp_path, stopped) == [False, False]


def test_a_finished_shard_of_which_an_image_changed_is_written_anew(crowd, tmp_path, stopped):
    image = next(iter(RecordReader(tmp_path / ".set.packing/set/shard_00001.rec"))).image
    (path,) = [path for path in crowd.glob("*/*") if path.read_bytes() == image]
    status = path.stat()
    path.write_bytes(commented(jpeg(), b"new"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as copying an old file with its time does
    pack([crowd], tmp_path / "set", 5)
    pack([crowd], tmp_path / "whole", 5)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert kept(tmp_path, stopped) == [True, False]


@pytest.mark.parametrize("remedy", ["mend", "policy"])
def test_after_a_bad_image_is_dealt_with_a_pack_goes_on(crowd, tmp_path, remedy):
    pack([crowd], tmp_path / "whole", 5)
    bad = next(iter(RecordReader(tmp_path / "whole/shard_00002.rec"))).image
    (path,) = [path for path in crowd.glob("*/*") if path.read_bytes() == bad]
    path.write_bytes(bad[:-20])
    with pytest.raises(DataError, match=rf"{path}: JPEG is cut short"):
        pack([crowd], tmp_path / "set", 5)
    before = written(tmp_path / ".set.packing/set")
    if remedy == "mend":
        path.write_bytes(bad)
        pack([crowd], tmp_path / "set", 5)
        assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    else:
        pack([crowd], tmp_path / "set", 5, policy=Policy(unreadable="drop"))
        whole = records_of(tmp_path / "whole")[0]
        assert records_of(tmp_path / "set")[0] == [record for record in whole if record[1] != bad]
    assert kept(tmp_path, before) == [True, True]


def test_a_shard_that_a_policy_has_changed_is_not_kept_under_another(crowd, tmp_path, monkeypatch):
    pack([crowd], tmp_path / "whole", 5)
    image = next(iter(RecordReader(tmp_path / "whole/shard_00000.rec"))).image
    (path,) = [path for path in crowd.glob("*/*") if path.read_bytes() == image]
    path.write_bytes(commented(jpeg(side=96), b"small"))
    failing_at(monkeypatch, 90, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pack([crowd], tmp_path / "set", 5, policy=Policy(wrong_size="resize"))
    monkeypatch.undo()
    before = written(tmp_path / ".set.packing/set")
    packed = pack([crowd], tmp_path / "set", 5, policy=Policy(wrong_size="drop"))
    assert packed.findings == {"wrong size, dropped": 1}
    assert kept(tmp_path, before) == [False, True]


def test_a_second_pack_to_the_same_place_is_refused_and_harms_nothing(crowd, tmp_path, stopped):
    with open(tmp_path / ".set.packing/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="set: another process is packing it"):
            pack([crowd], tmp_path / "set", 5)
        assert len(list((tmp_path / ".set.packing").glob("shard_*.json"))) == 2
    pack([crowd], tmp_path / "set", 5)
    assert kept(tmp_path, stopped) == [True, True]


@pytest.fixture
def flawed(source):
    """``source`` with two images of a wrong size, JPEG and PNG, and two that cannot be read."""
    (source / "Ann" / "large.jpg").write_bytes(jpeg((200, 40, 40), side=160))
    Image.new("RGB", (64, 80), (40, 200, 40)).save(source / "Bo" / "small.png")
    (source / "Bo" / "cut.jpg").write_bytes(jpeg()[:-30])
    (source / "Cy" / "text.jpg").write_text("hello")
    return source


def test_images_that_do_not_fit_are_dropped_on_request_and_named(flawed, tmp_path):
    packed = pack([flawed], tmp_path / "set", 2, policy=Policy(wrong_size="drop", unreadable="drop"))
    assert sorted(records_of(tmp_path / "set")[0]) == sorted(labelled(flawed, "[0-9].jpg"))
    assert packed.findings == {"wrong size, dropped": 2, "unreadable, dropped": 2}
    assert sorted(findings(tmp_path / "set"), key=lambda finding: finding["image"]) == [
        {"kind": "wrong size, dropped", "image": f"{flawed}/Ann/large.jpg", "size": "160x160"},
        {
            "kind": "unreadable, dropped",
            "image": f"{flawed}/Bo/cut.jpg",
            "problem": "JPEG is cut short (no end marker ffd9 after the image data)",
        },
        {"kind": "wrong size, dropped", "image": f"{flawed}/Bo/small.png", "size": "64x80"},
        {"kind": "unreadable, dropped", "image": f"{flawed}/Cy/text.jpg", "problem": "cannot be read as an image: its format is not known"},
    ]
    assert sorted(map(json.dumps, packed.examples)) == sorted(map(json.dumps, findings(tmp_path / "set")))
    assert (open_set(tmp_path / "set").num_images, packed.sidecar.num_images) == (11, 11)


def test_images_of_a_wrong_size_are_scaled_on_request(flawed, tmp_path):
    packed = pack([flawed], tmp_path / "set", 2, policy=Policy(wrong_size="resize", unreadable="drop"))
    assert packed.findings == {"wrong size, resized": 2, "unreadable, dropped": 2}
    stored = {image for _, image in records_of(tmp_path / "set")[0]} - {data for _, data in labelled(flawed)}
    colours = []
    for image in stored:
        with Image.open(io.BytesIO(image)) as pixels:
            assert (pixels.format, pixels.size, pixels.layer[1][1:3]) == ("JPEG", (112, 112), (1, 1))
            colours.append(tuple(round(value, -1) for value in pixels.getpixel((80, 60))))
    assert sorted(colours) == [(40, 200, 40), (200, 40, 40)]


def test_a_set_of_sound_images_has_no_findings(packed):
    assert not (packed / "findings.jsonl").exists()


@pytest.mark.parametrize("backend", ["table", "reader"])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_set_with_an_empty_shard_opens_and_loads(tmp_path, backend, empty):
    source = image_folder(tmp_path / "src", {f"{label:02d}": 4 for label in range(9)})
    pack([source], tmp_path / "whole", 3)
    dropped = {record.image for record in RecordReader(tmp_path / f"whole/shard_0000{empty}.rec")}
    for path in source.glob("*/*"):
        if path.read_bytes() in dropped:
            path.write_bytes(jpeg(side=100))
    packed = pack([source], tmp_path / "set", 3, policy=Policy(wrong_size="drop"))
    assert (packed.sidecar.shards[empty].bytes, packed.sidecar.shards[empty].records) == (0, 0)
    loader = FaceLoader(tmp_path / "set", 4, backend=backend)
    assert (loader.num_images, loader.num_classes, loader.batches_per_epoch) == (24, 9, 6)
    seen = []
    for _ in range(6):
        batch = next(loader)
        assert [label_of(image.numpy()) for image in batch.images] == batch.labels.tolist()
        seen += batch.records()
    assert len(set(seen)) == 24


def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path):
    (tmp_path / "src" / "Ann").mkdir(parents=True)
    (tmp_path / "src" / "Ann" / "0.jpg").write_bytes(jpeg(side=100))
    with pytest.raises(DataError, match="every image was dropped"):
        pack([tmp_path / "src"], tmp_path / "set", 1, policy=Policy(wrong_size="drop"))


def test_a_packed_set_opens_with_labels_and_counts(packed):
    faces = open_set(packed)
    found, offsets = records_of(packed)
    assert (faces.layout, faces.num_images, faces.num_classes) == ("packed", 11, 3)
    np.testing.assert_array_equal(faces.records["offset"], offsets)
    np.testing.assert_array_equal(faces.labels, [label for label, _ in found])
    np.testing.assert_array_equal(faces.images_per_class, [4, 2, 5])


def test_a_jpeg_with_aligned_magic_survives_packing(tmp_path):
    image = commented(jpeg(), b"xx" + MAGIC + b"." * 8 + MAGIC * 2)
    assert image.find(MAGIC) % 4 == 0
    (tmp_path / "src" / "Ann").mkdir(parents=True)
    (tmp_path / "src" / "Ann" / "0.jpg").write_bytes(image)
    pack([tmp_path / "src"], tmp_path / "set", 1)
    assert records_of(tmp_path / "set")[0] == [(0.0, image)]
    pack([tmp_path / "set"], tmp_path / "again", 1)
    assert records_of(tmp_path / "again")[0] == [(0.0, image)]
