"""The order of the table backend, on any number of ranks, and what it does about records that are damaged."""

import io
import itertools
import json
import os
import re
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import table_backend
from data_pipeline.augment import Augment
from data_pipeline.errors import DataError
from data_pipeline.loader import FaceLoader
from data_pipeline.pack import pack
from data_pipeline.recordio import RecordReader
from data_pipeline.shard_set import open_set
from tests.unit.loading import ALL, PLAIN, numbered_set, take
from tests.unit.record_sets import image_folder, jpeg, write_records


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """50 images in 3 shards; the label names the image."""
    return numbered_set(tmp_path_factory.mktemp("numbered"), 3, images=50)


def loaders(path, world_size, batch_size, states=None, **options):
    states = states or [None] * world_size
    return [
        FaceLoader(path, batch_size, rank=rank, world_size=world_size, num_threads=1, state=states[rank], **options)
        for rank in range(world_size)
    ]


def global_batches(ranks, steps, micro_batches):
    """The images and labels of whole global batches, put together from what the ranks read."""
    batches = []
    for _ in range(steps):
        parts = [[next(rank) for rank in ranks] for _ in range(micro_batches)]
        images = torch.cat([torch.stack([batch.images for batch in part], 1).flatten(0, 1) for part in parts])
        labels = torch.cat([torch.stack([batch.labels for batch in part], 1).flatten() for part in parts])
        batches.append((images, labels))
    return batches


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 4), (2, 2), (3, 2), (4, 3), (8, 1)])
def test_global_batches_are_the_same_on_any_number_of_ranks_pixel_by_pixel(numbered, world_size, batch_size):
    """One rank with the whole global batch at once is the reference."""
    whole = 24 if world_size in (3, 4) else 8
    options = {"global_batch_size": whole, "augment": ALL, "seed": 5}
    expected = global_batches(loaders(numbered, 1, whole, **options), 14, 1)
    found = global_batches(loaders(numbered, world_size, batch_size, **options), 14, whole // (world_size * batch_size))
    for (images, labels), (expected_images, expected_labels) in zip(found, expected, strict=True):
        assert torch.equal(labels, expected_labels)
        assert torch.equal(images, expected_images)


@pytest.mark.parametrize("after", [0, 3, 6, 8])
@pytest.mark.parametrize(("before", "then"), [((2, 4), (4, 2)), ((4, 1), (1, 8)), ((1, 8), (2, 1))])
def test_a_run_goes_on_with_other_ranks_as_if_it_had_always_had_them(numbered, before, then, after):
    """Six global batches of eight an epoch: the change comes at its start, in its middle, at its end, and in the second."""
    options = {"global_batch_size": 8, "augment": ALL, "seed": 5}
    expected = global_batches(loaders(numbered, 1, 8, **options), 14, 1)
    first = loaders(numbered, *before, **options)
    found = global_batches(first, after, 8 // (before[0] * before[1]))
    states = [json.loads(json.dumps(rank.state())) for rank in first]
    assert all(state == states[0] for state in states)
    found += global_batches(loaders(numbered, *then, [states[0]] * then[0], **options), 14 - after, 8 // (then[0] * then[1]))
    for (images, labels), (expected_images, expected_labels) in zip(found, expected, strict=True):
        assert torch.equal(labels, expected_labels)
        assert torch.equal(images, expected_images)
    epoch = [label for _, labels in found[:6] for label in labels.tolist()]
    assert len(epoch) == len(set(epoch)) == 48


def test_a_state_from_inside_a_step_does_not_fit_larger_batches(numbered):
    (rank,) = loaders(numbered, 1, 2, global_batch_size=8)
    take(rank, 1)
    with pytest.raises(DataError, match="2 images were read, which is no multiple of batch_size x world_size = 8: it was taken inside"):
        loaders(numbered, 2, 4, [rank.state()] * 2, global_batch_size=8)


def test_a_global_batch_that_ranks_cannot_share_is_refused(numbered):
    with pytest.raises(DataError, match="global_batch_size: 10 is no multiple of batch_size x world_size = 4 x 2"):
        FaceLoader(numbered, 4, world_size=2, global_batch_size=10)


def test_one_shard_is_shuffled_as_well_as_many(tmp_path):
    """Neighbours on the disk are as often neighbours in a batch as chance has it: 2 of 240 places, 0.4 a batch of 48."""
    path = numbered_set(tmp_path, 1, images=240)
    stored = open_set(path).labels.tolist()
    rank_of = {label: i for i, label in enumerate(stored)}
    neighbours = 0
    for batch in take(FaceLoader(path, 48, num_threads=1, augment=PLAIN), 50):
        places = sorted(rank_of[label] for label in batch.labels.tolist())
        neighbours += sum(b - a == 1 for a, b in itertools.pairwise(places))
    expected = 50 * 47 * 48 / 240  # of 48 of 240 places: 47 x 48 / 240 pairs of neighbours
    assert abs(neighbours - expected) < 5 * expected**0.5


def damaged(source, folder, number, how):
    """A copy of a set whose record ``number`` is damaged; returns the record's label."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    faces = open_set(source)
    shard, offset, _ = faces.place(number)
    path = folder / faces.shards[shard].name
    body = bytearray(path.read_bytes())
    how(body, offset, int(faces.records["length"][number]))
    path.write_bytes(body)
    return int(faces.labels[number])


def flip_a_byte(body, offset, length):
    body[offset + length // 2] ^= 0x10


def other_magic(body, offset, length):
    body[offset] ^= 0xFF


def other_label(body, offset, length):
    body[offset + 12 : offset + 16] = np.float32(3.5).tobytes()


@pytest.mark.parametrize(
    ("how", "complaint"),
    [(flip_a_byte, "CRC32 [0-9a-f]{8}, the set's table says"), (other_magic, "magic"), (other_label, "label 3.5, the")],
)
def test_a_damaged_record_is_named_counted_and_replaced_by_an_image_that_the_epoch_leaves_out(numbered, tmp_path, how, complaint):
    said = []
    label = damaged(numbered, tmp_path / "set", 17, how)
    options = {"augment": ALL, "num_threads": 1}
    bad, sound = FaceLoader(tmp_path / "set", 8, say=said.append, **options), FaceLoader(numbered, 8, **options)
    for epoch in range(4):
        labels, pairs = [], list(zip(take(bad, 6), take(sound, 6), strict=True))
        for mine, theirs in pairs:
            labels += mine.labels.tolist()
            for i in range(8):
                replaced = theirs.labels[i] == label
                assert (mine.labels[i] != theirs.labels[i]) == replaced
                assert torch.equal(mine.images[i], theirs.images[i]) != replaced
        assert len(set(labels)) == 48, f"epoch {epoch}: an image was read twice"
        assert label not in labels
    assert len(said) == len(bad.bad_records) == 1
    faces = open_set(numbered)
    assert f"{faces.names([17])[0].split()[0]}: record at offset {faces.place(17)[1]} (key {faces.place(17)[2]}): " in said[0]
    assert re.search(complaint, said[0])


def test_a_resumed_run_replaces_bad_records_by_the_same_images(numbered, tmp_path):
    damaged(numbered, tmp_path / "set", 17, flip_a_byte)
    said = []
    loader = FaceLoader(tmp_path / "set", 8, augment=ALL, num_threads=1, say=said.append)
    take(loader, 15)
    state = json.loads(json.dumps(loader.state()))
    expected = take(loader, 12)
    resumed = FaceLoader(tmp_path / "set", 8, augment=ALL, num_threads=1, say=said.append, state=state)
    for mine, theirs in zip(take(resumed, 12), expected, strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert mine.records() == theirs.records()
    assert len(said) == 1  # it is known already
    assert resumed.bad_records == loader.bad_records != {}


def test_too_many_bad_records_stop_the_run_with_the_remedy(numbered, tmp_path):
    damaged(numbered, tmp_path / "one", 17, flip_a_byte)
    damaged(tmp_path / "one", tmp_path / "set", 30, flip_a_byte)
    take(FaceLoader(tmp_path / "set", 8, max_bad_records=2, say=lambda _: None), 12)
    with pytest.raises(DataError, match=r"rank 0: .*CRC32.*bad record number 2 of this rank.*allows 1: copy the damaged shards again"):
        take(FaceLoader(tmp_path / "set", 8, max_bad_records=1, say=lambda _: None), 12)


def without_quantization_tables(image):
    """A JPEG with size and end whose tables have become comments."""
    return image.replace(b"\xff\xdb", b"\xff\xfe")


def test_an_image_that_cannot_be_decoded_is_replaced_like_any_bad_record(tmp_path):
    """Its checksum is right: it was like this when it was packed. DALI fails on the whole batch and does not say at which image."""
    image_folder(tmp_path / "src", {f"{i:03d}": 1 for i in range(20)})
    (tmp_path / "src" / "007" / "0.jpg").write_bytes(without_quantization_tables(jpeg()))
    pack([tmp_path / "src"], tmp_path / "set", 2)
    said, labels = [], []
    loader = FaceLoader(tmp_path / "set", 6, augment=ALL, num_threads=1, say=said.append)
    for epoch in range(3):
        labels = [label for batch in take(loader, 3) for label in batch.labels.tolist()]
        assert len(set(labels)) == 18, f"epoch {epoch}"
        assert 7 not in labels
    assert len(said) == 1
    assert "cannot be decoded (" in said[0]


def test_a_failure_of_dali_that_is_no_image_s_fault_is_passed_on_and_blames_no_record(numbered, monkeypatch):
    loader = FaceLoader(numbered, 8, num_threads=1)
    take(loader, 2)

    def failing(pipeline, device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(table_backend, "run", failing)
    for _ in range(3):  # a loader that failed stays failed: nothing is skipped
        with pytest.raises(DataError, match=r"set: rank 0, step 3: DALI failed: out of memory"):
            next(loader)
    assert loader.bad_records == {}


def test_an_error_of_a_batch_to_come_is_raised_in_its_place_and_ever_after(numbered, tmp_path):
    damaged(numbered, tmp_path / "set", 17, flip_a_byte)
    label = int(open_set(numbered).labels[17])
    sound, bad = FaceLoader(numbered, 8, num_threads=1), FaceLoader(tmp_path / "set", 8, num_threads=1, max_bad_records=0, say=print)
    good = 0
    while label not in (expected := next(sound)).labels.tolist():
        try:
            assert torch.equal(next(bad).labels, expected.labels)
            good += 1
        except DataError:
            break
    for _ in range(3):
        with pytest.raises(DataError, match="bad record number 1"):
            next(bad)
    assert bad.state()["images"] == 8 * good  # what was trained on, and no more


def test_several_bad_records_are_replaced_by_sound_images_also_where_the_epoch_leaves_out_few(numbered, tmp_path):
    """49 images in batches of 12 leave out one, which is bad itself in some epochs."""
    folder = numbered
    bad = [3, 17, 20, 21, 44]
    labels = []
    for i, number in enumerate(bad):
        labels.append(damaged(folder, tmp_path / f"set{i}", number, flip_a_byte))
        folder = tmp_path / f"set{i}"
    for batch_size in (7, 10):  # 49 of 50 images are read, or all
        loader = FaceLoader(folder, batch_size, num_threads=1, say=lambda _: None)
        for batch in take(loader, 30):
            assert not set(batch.labels.tolist()) & set(labels)
        assert len(loader.bad_records) == 5


def test_a_limit_that_was_lowered_holds_at_once(numbered, tmp_path):
    damaged(numbered, tmp_path / "set", 17, flip_a_byte)
    loader = FaceLoader(tmp_path / "set", 8, num_threads=1, say=lambda _: None)
    take(loader, 6)
    with pytest.raises(DataError, match=r"bad record number 1 of this rank, and data.max_bad_records allows 0"):
        FaceLoader(tmp_path / "set", 8, num_threads=1, max_bad_records=0, state=loader.state())


def test_what_another_loader_found_is_known_and_not_said_again(numbered, tmp_path):
    damaged(numbered, tmp_path / "set", 17, flip_a_byte)
    said = []
    first = FaceLoader(tmp_path / "set", 8, num_threads=1, say=said.append)
    take(first, 6)
    second = FaceLoader(tmp_path / "set", 4, num_threads=1, say=said.append, bad_records=first.bad_records)
    take(second, 24)
    assert len(said) == 1
    assert second.bad_records == first.bad_records


def test_too_few_descriptors_for_the_shards_are_an_error_at_the_start(tmp_path):
    path = numbered_set(tmp_path, 40, images=40)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        with pytest.raises(
            DataError, match=r"shard_000\d\d\.rec: cannot be opened \(Too many open files\).*all 40 shards: raise `ulimit -n`"
        ):
            FaceLoader(path, 8, num_threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_images_of_another_size_in_a_field_set_are_replaced(tmp_path):
    write_records(tmp_path / "train.rec", [(key, float(key), jpeg(side=128 if key == 3 else 112)) for key in range(10)])
    said = []
    loader = FaceLoader(tmp_path, 4, num_threads=1, say=said.append)
    labels = [label for batch in take(loader, 2) for label in batch.labels.tolist()] + next(loader).labels.tolist()
    assert 3 not in labels
    assert "key 3): an image of 128x128 pixels, expected 112x112" in said[0]


def test_png_records_are_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    write_records(tmp_path / "train.rec", [(key, 0.0, file.getvalue()) for key in range(2)])
    (batch,) = take(FaceLoader(tmp_path, 2, augment=PLAIN), 1)
    expected = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    assert (batch.images - expected).abs().max() < 1e-6


def test_a_shard_that_is_cut_short_under_the_loader_is_an_error_and_no_signal(tmp_path):
    path = numbered_set(tmp_path, 1, images=40)
    loader = FaceLoader(path, 8, num_threads=1, say=lambda _: None, max_bad_records=0)
    next(loader)
    with open(path / "shard_00000.rec", "r+b") as file:
        file.truncate(64)
    with pytest.raises(DataError, match=r"bytes, the set's table says \d+: the file was cut short; that is bad record number 1"):
        take(loader, 5)


def test_records_are_what_the_file_holds(numbered):
    """By another reader: the record that a name leads to has the image that the batch shows."""
    batch = next(FaceLoader(numbered, 8, augment=Augment(flip=0), num_threads=1))
    for name, image in zip(batch.records(), batch.images, strict=True):
        shard, _, offset, _, _ = name.split()
        record = RecordReader(numbered / shard).read_at(int(offset))
        pixels = np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB"), np.float32).transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(image.numpy() - pixels).max() <= 2.01 / 127.5
