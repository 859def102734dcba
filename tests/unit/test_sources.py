import os
import pickle
import zlib

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.pack import pack
from data_pipeline.quarantine import Unfit, write_quarantine
from data_pipeline.recordio import RecordReader
from data_pipeline.shard_set import open_set
from data_pipeline.sources import open_source
from tests.unit.record_sets import MAGIC, commented, field_records, framed, image_folder, jpeg, payload, write_records

COUNTS = [2, 1, 3]  # images per identity of the field sets here


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "faces", {"Ann": 3, "Bo": 1, "Cy": 2})


@pytest.fixture
def field(tmp_path):
    (tmp_path / "field").mkdir()
    write_records(tmp_path / "field" / "train.rec", field_records(COUNTS), shuffle=1)
    return tmp_path / "field"


def images(source, numbers):
    return [image for image, _ in source.read(np.array(numbers))]


def everything(source):
    """(label, bytes) of every image."""
    numbers = np.arange(len(source))
    return list(zip(source.labels(numbers).tolist(), images(source, numbers), strict=True))


def in_another_process(source):
    """What a worker gets."""
    return pickle.loads(pickle.dumps(source))


def images_of(folder, names=("Ann", "Bo", "Cy")):
    """(label, bytes) of every JPEG of an image folder that is not hidden."""
    return [(label, file.read_bytes()) for label, name in enumerate(names) for file in sorted((folder / name).glob("[!.]*.[jJ]*"))]


def field_images(counts=COUNTS):
    return [(int(label), image) for _, label, image in field_records(counts) if image]


def lines(kind, names):
    """A ``.lst`` of the field set; the identities' folders are ``names``."""
    labels = [label for label, _ in field_images()]
    paths = [f"faces/{names[label]}/{i}.jpg" for i, label in enumerate(labels)]
    if kind == "im2rec":
        return "".join(f"{i}\t{label:.6f}\t{path}\n" for i, (label, path) in enumerate(zip(labels, paths, strict=True)))
    return "".join(f"1\t/data/{path}\t{label}\n" for label, path in zip(labels, paths, strict=True))


def test_a_folder_gives_its_images_and_names_them(folder, tmp_path):
    (folder / "Ann" / ".hidden.jpg").write_bytes(b"")
    (folder / "Ann" / "notes.txt").write_text("no image")
    (folder / ".cache").mkdir()
    (folder / "readme").write_text("no identity")
    (folder / "Bo" / "0.jpg").rename(folder / "Bo" / "Z.JPEG")
    for source in (made := open_source([folder], None, tmp_path), in_another_process(made)):
        assert (len(source), source.num_classes, source.identities()) == (6, 3, ["Ann", "Bo", "Cy"])
        assert everything(source) == images_of(folder)
        assert [source.where(i) for i in (0, 3, 5)] == [f"{folder}/Ann/0.jpg", f"{folder}/Bo/Z.JPEG", f"{folder}/Cy/1.jpg"]
        assert source.read_one(4) == (folder / "Cy" / "0.jpg").read_bytes()


def test_the_digest_of_a_folder_is_of_its_names(folder, tmp_path):
    def digest():
        return open_source([folder], None, tmp_path).digest

    before = digest()
    (folder / "Ann" / "0.jpg").write_bytes(jpeg(mark=99))
    assert digest() == before
    (folder / "Ann" / "2.jpg").rename(folder / "Bo" / "2.jpg")
    assert digest() != before


def test_a_file_that_cannot_be_read_is_named_in_its_place(folder, tmp_path):
    source = open_source([folder], None, tmp_path)
    (folder / "Bo" / "0.jpg").unlink()
    read = images(source, range(6))
    assert [isinstance(image, DataError) for image in read] == [False, False, False, True, False, False]
    assert str(read[3]) == f"{folder}/Bo/0.jpg: cannot be read (No such file or directory)"


def test_a_change_of_an_image_is_seen_whatever_its_time(folder, tmp_path):
    source = open_source([folder], None, tmp_path)
    before = [source.changed(np.array([i])) for i in range(6)]
    assert source.changed(np.arange(6)) == max(before)
    (folder / "Bo" / "0.jpg").write_bytes(jpeg())
    os.utime(folder / "Bo" / "0.jpg", (0, 0))
    after = [source.changed(np.array([i])) for i in range(6)]
    assert [when for _, when in source.read(np.arange(6))] == after
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, True, False, True, True]
    assert source.changed(np.arange(6)) == after[3] > max(before)


def test_a_field_set_gives_its_images_under_its_labels(field, tmp_path):
    for path in (field, field / "train.rec"):
        source = in_another_process(open_source([path], None, tmp_path))
        assert everything(source) == field_images()
        assert source.identities() == ["0", "1", "2"]
    assert source.where(0).startswith(f"{field}/train.rec: record at offset ")
    assert source.where(0).endswith(" (key 1)")


@pytest.mark.parametrize("kind", ["im2rec", "InsightFace"])
def test_the_folders_in_a_list_beside_a_field_set_are_its_identities(field, tmp_path, kind):
    (field / "train.lst").write_text(lines(kind, ["Zoë", "b b", "a"]))
    assert open_source([field], None, tmp_path).identities() == ["Zoë", "b b", "a"]
    pack([field], tmp_path / "set", 2)
    assert open_set(tmp_path / "set").identities() == ["Zoë", "b b", "a"]
    assert sorted(packed_records(tmp_path / "set")) == sorted(field_images())


def packed_records(folder):
    return [(int(record.labels[0]), record.image) for shard in sorted(folder.glob("*.rec")) for record in RecordReader(shard)]


def test_lists_that_do_not_fit_are_refused_by_line(field, tmp_path):
    def refused(text, complaint):
        (field / "train.lst").write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(DataError, match=rf"train\.lst: {complaint}"):
            open_source([field], None, tmp_path).identities()

    sound = lines("im2rec", ["a", "b", "c"])
    refused(sound + "7\tx\tf/a/1.jpg\n", r"line 7: expected key, label and path separated by tabs, found '7\\tx")
    refused(sound + "7\t1\n", "line 7: label 1 and folder ''")
    refused(sound + "7\n", "line 7: expected key")
    refused(sound + "7\tinf\tf/a/1.jpg\n", "line 7: expected key")
    refused(sound + "7\t0.5\tf/a/1.jpg\n", "line 7: expected key")
    refused(sound + "7\t3\tf/a/1.jpg\n", r"line 7: label 3 and folder 'a', expected a label in \[0, 3\)")
    refused(sound + "7\t1\tflat.jpg\n", "line 7: label 1 and folder ''")
    refused(sound + "7\t1\tf/a/1.jpg\n", "line 7: label 1 is 'a', but 'b' before")
    refused("0\t0\tf/a/0.jpg\n1\t2\tf/c/1.jpg\n", "no line of label 1, which has 1 images")
    refused(lines("im2rec", ["a", "b", "a"]), "'a' is the folder of several labels")
    (field / "train.lst").write_bytes(lines("im2rec", ["a", "b", "X"]).encode().replace(b"X", b"\xff"))
    assert os.fsencode(open_source([field], None, tmp_path).identities()[2]) == b"\xff"


def test_a_class_without_images_needs_no_line(tmp_path):
    write_records(tmp_path / "train.rec", field_records([1, 0, 1]))
    (tmp_path / "train.lst").write_text("0\t0\tf/a/0.jpg\n1\t2\tf/c/1.jpg\n")
    assert open_source([tmp_path], None, tmp_path).identities() == ["a", "1", "c"]


def test_several_labels_and_parts_and_an_index_with_gaps_are_read(tmp_path):
    plain = jpeg()
    image = commented(plain, b"xx" + MAGIC + b"...." + MAGIC)
    body = payload([1.0, 7.5], image, 5)
    cuts = [at for at in range(0, len(body), 4) if body[at : at + 4] == MAGIC]
    assert len(cuts) == 2
    pieces = [body[: cuts[0]], body[cuts[0] + 4 : cuts[1]], body[cuts[1] + 4 :]]
    parts = b"".join(framed(piece, cflag) for piece, cflag in zip(pieces, (1, 2, 3), strict=True))
    records = [parts, framed(payload(9.0, b"not in the index")), framed(payload([0.0, 3.0], plain))]
    (tmp_path / "a.rec").write_bytes(b"".join(records))
    (tmp_path / "a.idx").write_text(f"5\t0\n6\t{len(records[0]) + len(records[1])}\n")
    source = open_source([tmp_path], None, tmp_path)
    assert everything(source) == [(1, image), (0, plain)]
    assert source.faces.records["length"].tolist() == [len(records[0]), len(records[2])]


def test_a_packed_set_gives_its_images_and_identities(folder, tmp_path):
    pack([folder], tmp_path / "set", 3)
    source = in_another_process(open_source([tmp_path / "set"], None, tmp_path))
    assert sorted(everything(source)) == sorted(images_of(folder))
    assert source.identities() == ["Ann", "Bo", "Cy"]


def test_a_byte_that_changed_in_a_packed_set_is_not_packed_again_as_sound(folder, tmp_path):
    pack([folder], tmp_path / "set", 1)
    shard = tmp_path / "set" / "shard_00000.rec"
    second = list(RecordReader(shard))[1]
    body = bytearray(shard.read_bytes())
    body[second.offset + 8 + 24 + 300] ^= 1
    shard.write_bytes(body)
    found = zlib.crc32(list(RecordReader(shard))[1].image)
    complaint = (
        rf"record at offset {second.offset} \(key 1\): CRC32 {found:08x}, the set's table says {zlib.crc32(second.image):08x}: "
        "the image changed after packing; mend it"
    )
    with pytest.raises(DataError, match=complaint):
        pack([tmp_path / "set"], tmp_path / "again", 1)


@pytest.mark.parametrize("kind", ["field", "packed"])
def test_records_in_quarantine_stay_out(field, folder, tmp_path, kind):
    if kind == "packed":
        pack([folder], tmp_path / "set", 3)
    path = field / "train.rec" if kind == "field" else tmp_path / "set"
    whole = open_source([path], None, tmp_path)
    shard, offset, key = whole.faces.place(2)
    write_quarantine(path, whole.faces.shards, [Unfit(whole.faces.shards[shard].name, offset, key, "blurred")])
    source = in_another_process(open_source([path], None, tmp_path))
    assert everything(source) == [image for i, image in enumerate(everything(whole)) if i != 2]
    assert source.where(2) == whole.where(3)
    assert source.digest != whole.digest


def test_merged_sources_have_labels_of_their_own_even_where_names_collide(folder, field, tmp_path):
    other = image_folder(tmp_path / "other", {"Ann": 1, "Dee": 2})
    for source in (made := open_source([folder, field, other], None, tmp_path), in_another_process(made)):
        expected = images_of(folder) + [(3 + label, image) for label, image in field_images()]
        expected += [(6 + label, image) for label, image in images_of(other, ("Ann", "Dee"))]
        assert (len(source), source.num_classes) == (15, 8)
        assert source.identities() == ["s0_Ann", "s0_Bo", "s0_Cy", "s1_0", "s1_1", "s1_2", "s2_Ann", "s2_Dee"]
        assert everything(source) == expected
        mixed = np.array([14, 0, 7, 7, 5, 12])
        assert images(source, mixed) == [expected[i][1] for i in mixed]
        assert source.labels(mixed).tolist() == [expected[i][0] for i in mixed]
        assert source.where(13) == f"{other}/Dee/0.jpg"
        assert "train.rec: record at" in source.where(6)
        assert source.changed(mixed) == max(source.changed(np.array([i])) for i in mixed)
    pack([folder, field, other], tmp_path / "set", 4, seed=3)
    assert sorted(packed_records(tmp_path / "set")) == sorted(expected)
    assert open_set(tmp_path / "set").images_per_class.tolist() == [3, 1, 2, *COUNTS, 1, 2]


def test_the_identities_of_many_sources_sort_as_they_are_merged(folder, tmp_path):
    names = open_source([folder] * 11, None, tmp_path).identities()
    assert names[:2] == ["s00_Ann", "s00_Bo"]
    assert names[-1] == "s10_Cy"
    assert names == sorted(names)
