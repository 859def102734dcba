import gc
import io
import json
import os
import re

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.loader import Augment, FaceLoader, batches_per_epoch
from data_pipeline.pack import pack
from data_pipeline.recordio import RecordReader, RecordWriter
from data_pipeline.shard_set import open_set
from tests.unit.record_sets import MAGIC, colour_of, field_records, image_folder, jpeg, label_of, write_records

PLAIN = Augment(flip=0.0)
ALL = Augment(flip=0.5, shift_px=6, brightness=0.3)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """29 images of 6 identities in 3 shards; the colour of an image tells its label."""
    root = tmp_path_factory.mktemp("data")
    image_folder(root / "src", {"a": 7, "b": 1, "c": 9, "d": 2, "e": 6, "f": 4})
    pack(root / "src", root / "set", 3)
    return root / "set"


def numbered_set(folder, shard_sizes):
    """A packed set whose identities have one image each: the label names the image."""
    image_folder(folder / "src", {f"{i:03d}": 1 for i in range(sum(shard_sizes))})
    pack(folder / "src", folder / "set", len(shard_sizes))
    return folder / "set"


def take(loader, batches):
    return [next(loader) for _ in range(batches)]


def same(one, two):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and (a.epoch, a.step) == (b.epoch, b.step)
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 1), (2, 3), (3, 1), (3, 3), (3, 2), (4, 2)])
def test_in_every_epoch_no_image_is_read_twice_and_ranks_read_equally(tmp_path, shards, world_size, batch_size):
    """10 images: shares of 10, 5 + 5, 3 + 3 + 4, 2 + 3 + 2 + 3. DALI's own epochs read images twice where shares differ."""
    path = numbered_set(tmp_path, {1: [10], 3: [4, 3, 3]}[shards])
    loaders = [FaceLoader(path, batch_size, rank=rank, world_size=world_size, augment=PLAIN, num_threads=1) for rank in range(world_size)]
    assert {loader.steps_per_epoch for loader in loaders} == {10 // world_size // batch_size}
    seen_ever = set()
    for epoch in range(5):
        batches = [batch for loader in loaders for batch in take(loader, loader.steps_per_epoch)]
        seen = [label for batch in batches for label in batch.labels.tolist()]
        assert {batch.epoch for batch in batches} == {epoch}
        assert len(seen) == len(set(seen)) == world_size * loaders[0].steps_per_epoch * batch_size
        seen_ever |= set(seen)
    assert seen_ever == set(range(10))  # what one epoch leaves out, another reads


def test_the_order_changes_with_the_epoch_and_the_seed(packed):
    def order(seed, batches):
        return [label for batch in take(FaceLoader(packed, 4, seed=seed), batches) for label in batch.labels.tolist()]

    first = order(0, 14)
    assert first == order(0, 14)
    assert first[:28] != first[28:]
    assert first != order(1, 14)


def test_shapes_types_range_and_labels_belong_to_the_images(packed):
    loader = FaceLoader(packed, 5, augment=PLAIN)
    assert (loader.num_images, loader.num_classes, loader.steps_per_epoch) == (29, 6, 5)
    for step, batch in enumerate(take(loader, 11), start=1):
        assert (batch.images.shape, batch.images.dtype, batch.images.is_contiguous()) == ((5, 3, 112, 112), torch.float32, True)
        assert (batch.labels.shape, batch.labels.dtype) == ((5,), torch.int64)
        assert (batch.step, batch.epoch) == (step, (step - 1) // 5)
        assert -1 <= batch.images.min() < batch.images.max() <= 1
        assert [label_of(image.numpy()) for image in batch.images] == batch.labels.tolist()


def decoded(path):
    """Every image of a set by Pillow, [N, 3, 112, 112] in [-1, 1], and labels."""
    records = [record for shard in open_set(path).shards for record in RecordReader(shard) if record.is_image]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB"), np.float32) for record in records])
    return (pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5, np.array([record.labels[0] for record in records])


def nearest(image, images):
    distances = np.abs(images - image).reshape(len(images), -1)
    best = distances.mean(1).argmin()
    return best, distances[best].max()


@pytest.mark.faces
def test_pixels_equal_those_of_another_decoder_on_real_faces(faces):
    images, labels = decoded(faces / "records")
    for batch in take(FaceLoader(faces / "records", 4, augment=PLAIN), 4):
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            best, worst = nearest(image, images)
            assert labels[best] == label
            assert worst <= 2.01 / 127.5  # two JPEG decoders may differ by a grey level or two


def test_half_of_the_images_are_mirrored_and_nothing_else_changes(packed):
    images, _ = decoded(packed)
    both = np.concatenate([images, images[..., ::-1]])
    chosen = []
    for batch in take(FaceLoader(packed, 5), 20):
        for image in batch.images.numpy():
            best, worst = nearest(image, both)
            assert worst <= 2.01 / 127.5
            chosen.append(best >= len(images))
    assert 30 <= sum(chosen) <= 70  # of 100, 4 sigma
    assert all(label_of(image.numpy()) == label for image, label in zip(batch.images, batch.labels.tolist(), strict=True))


def test_ranks_flip_different_images(tmp_path):
    """Two ranks that see the same four images draw their own coins."""
    write_records(tmp_path / "train.rec", [(key, 0.0, jpeg()) for key in range(32)])
    flips = []
    for rank in range(2):
        batches = take(FaceLoader(tmp_path, 16, rank=rank, world_size=2), 4)
        flips.append([bool(image[0, 50, 5] > image[0, 50, 100]) for batch in batches for image in batch.images])
    assert flips[0] != flips[1]


def test_shift_moves_whole_pixels_up_to_the_limit_and_fills_grey(packed):
    images, _ = decoded(packed)
    found = set()
    for batch in take(FaceLoader(packed, 5, augment=Augment(flip=0, shift_px=2)), 20):
        for image in batch.images.numpy():
            grey = np.abs(image - (127 / 255 - 0.5) / 0.5).max(axis=0) < 1e-6
            top, left = grey[:, 56].argmin(), grey[56].argmin()
            down, right = top - grey[::-1, 56].argmin(), left - grey[56, ::-1].argmin()
            rows, columns = slice(max(down, 0), 112 + min(down, 0)), slice(max(right, 0), 112 + min(right, 0))
            source_rows, source_columns = slice(max(-down, 0), 112 - max(down, 0)), slice(max(-right, 0), 112 - max(right, 0))
            _, worst = nearest(image[:, rows, columns], images[:, :, source_rows, source_columns])
            assert worst <= 2.01 / 127.5
            found.add((down, right))
    assert {abs(move) for pair in found for move in pair} == {0, 1, 2}
    assert len(found) > 15  # of 25


def test_brightness_scales_every_image_by_its_own_factor(tmp_path):
    write_records(tmp_path / "train.rec", [(key, 0.0, jpeg((100, 100, 100))) for key in range(40)])
    (batch,) = take(FaceLoader(tmp_path, 40, augment=Augment(flip=0, brightness=0.2)), 1)
    factors = ((batch.images[:, 0, 50, 80] * 0.5 + 0.5) * 255 / 100).numpy()
    assert 0.79 <= factors.min() < 0.88
    assert 1.12 < factors.max() <= 1.21


def test_images_stay_what_they_were_while_the_loader_reads_on(packed):
    loader = FaceLoader(packed, 5, augment=ALL)
    kept = take(loader, 12)
    copies = [(batch.images.clone(), batch.labels.clone()) for batch in kept]
    kept[0].images.zero_()
    copies[0][0].zero_()
    take(loader, 20)
    del loader
    gc.collect()
    for batch, (images, labels) in zip(kept, copies, strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)


def record_named(folder, name):
    """The record that a name leads to, found as a user would."""
    shard, offset, key = re.fullmatch(r"(\S+) offset (\d+) \(key (\d+)\)", name).groups()
    return int(key), RecordReader(folder / shard).read_at(int(offset))


def test_a_batch_names_its_records_whenever_it_is_asked(packed):
    """Also when the loader has read on, and is gone, and the tensors are gone; after a resume; on every rank."""
    for rank in range(2):
        loader = FaceLoader(packed, 3, rank=rank, world_size=2, augment=ALL)
        batches = take(loader, 6)
        resumed = FaceLoader(packed, 3, rank=rank, world_size=2, augment=ALL, state=loader.state())
        batches += take(resumed, 6)
        labels, asks = [batch.labels.tolist() for batch in batches], [batch.records for batch in batches]
        at_once = asks[0]()
        take(resumed, 20)
        del loader, resumed, batches
        gc.collect()
        assert asks[0]() == at_once
        for ask, expected in zip(asks, labels, strict=True):
            named = [record_named(packed, name) for name in ask()]
            assert [record.labels[0] for _, record in named] == expected
            assert all(key == record.id for key, record in named)  # pack writes the key into the record
        assert len(set(at_once)) == 3


def test_records_of_a_field_set_keep_the_keys_of_its_index(tmp_path):
    """The index is shuffled, its keys begin at 1, and DALI reads another index that leaves out the records without an image."""
    records = field_records([5, 0, 4, 3])
    offsets = write_records(tmp_path / "train.rec", records, shuffle=2)
    keys = {offset: key for (key, _, _), offset in zip(records, offsets, strict=True)}
    for batch in take(FaceLoader(tmp_path / "train.rec", 4), 6):
        named = [record_named(tmp_path, name) for name in batch.records()]
        assert [record.labels[0] for _, record in named] == batch.labels.tolist()
        assert all(keys[record.offset] == key for key, record in named)


def test_records_are_named_where_small_identities_are_left_out(packed):
    kept = [0, 2, 4, 5]
    for batch in take(FaceLoader(packed, 4, min_images_per_identity=4), 6):
        labels = [record_named(packed, name)[1].labels[0] for name in batch.records()]
        assert labels == [kept[label] for label in batch.labels.tolist()]


def test_records_of_a_set_given_by_a_relative_path_are_named(packed, monkeypatch):
    monkeypatch.chdir(packed.parent)
    batch = next(FaceLoader("set", 4))
    assert [record_named(packed, name)[1].labels[0] for name in batch.records()] == batch.labels.tolist()


def test_an_index_that_changed_since_is_no_reason_for_a_wrong_name(packed, tmp_path):
    pack(packed.parent / "src", tmp_path / "set", 1)
    batch = next(FaceLoader(tmp_path / "set", 4))
    index = tmp_path / "set" / "shards.idx"
    index.write_text("".join(f"{key}\t{4 * key + 2}\n" for key in range(29)))
    with pytest.raises(DataError, match=r"shards\.idx: lists no record at .*shard_00000\.rec at index \d+; it was changed"):
        batch.records()


@pytest.mark.parametrize("at", [0, 1, 6, 7, 8, 14, 20])
def test_a_resumed_loader_continues_bit_for_bit(packed, at):
    def arguments(threads):
        return {"rank": 1, "world_size": 2, "augment": ALL, "seed": 3, "num_threads": threads}

    loader = FaceLoader(packed, 2, **arguments(1))
    assert loader.steps_per_epoch == 7
    take(loader, at)
    state = json.loads(json.dumps(loader.state()))
    assert state["step"] == at
    expected = take(loader, 16)
    resumed = FaceLoader(packed, 2, **arguments(2), state=state)
    assert same(take(resumed, 5), expected[:5])
    again = FaceLoader(packed, 2, **arguments(2), state=resumed.state())  # the state of a resumed run is as good
    assert same(take(again, 11), expected[5:])
    assert same(take(resumed, 11), expected[5:])


def test_the_state_of_another_run_is_refused_with_both_values(packed, tmp_path):
    state = FaceLoader(packed, 2).state()
    for change, complaint in (
        ({"batch_size": 4}, "batch_size: 2 in the state, 4 here"),
        ({"seed": 9}, "seed: 0 in the state, 9 here"),
        ({"world_size": 2}, "world_size: 1 in the state, 2 here"),
        ({"rank": 1, "world_size": 2}, r"rank: 0 in the state, 1 here; world_size: 1 in the state, 2 here"),
        ({"augment": Augment(flip=0.1)}, r"augment\.flip: 0\.5 in the state, 0\.1 here"),
        ({"min_images_per_identity": 2}, "num_images: 29 in the state, 28 here; num_classes: 6 in the state, 5 here"),
    ):
        with pytest.raises(DataError, match=complaint):
            FaceLoader(packed, **{"batch_size": 2, **change}, state=state)
    pack(packed.parent / "src", tmp_path / "other", 3, seed=5)
    with pytest.raises(DataError, match=r"set: '[0-9a-f]{64}' in the state, '[0-9a-f]{64}' here\)"):
        FaceLoader(tmp_path / "other", 2, state=state)
    with pytest.raises(DataError, match=r"expected what FaceLoader\.state"):
        FaceLoader(packed, 2, state={"step": 3})


def test_more_ranks_than_batches_is_refused_with_the_numbers(packed):
    with pytest.raises(DataError, match="num_images=29 is less than world_size=8 x batch_size=4"):
        FaceLoader(packed, 4, world_size=8)
    with pytest.raises(DataError, match=r"num_images=0 with min_images_per_identity=50 is less"):
        FaceLoader(packed, 4, min_images_per_identity=50)


def test_a_set_of_another_size_than_expected_is_refused_with_both_numbers(packed):
    FaceLoader(packed, 4, expected_images=29, expected_classes=6)
    FaceLoader(packed, 4, min_images_per_identity=2, expected_images=28, expected_classes=5)
    with pytest.raises(DataError, match=r"data\.num_images: 30 expected, but .*set has 29: mend data\.path or data\.num_images"):
        FaceLoader(packed, 4, expected_images=30)
    with pytest.raises(DataError, match=r"data\.num_classes: 6 expected, but .*set with min_images_per_identity=2 has 5: "):
        FaceLoader(packed, 4, min_images_per_identity=2, expected_images=28, expected_classes=6)


@pytest.mark.parametrize(("images", "ranks", "size", "batches"), [(29, 1, 5, 5), (29, 2, 7, 2), (29, 2, 8, 1), (29, 3, 10, 0)])
def test_an_epoch_is_the_full_batches_of_an_equal_share(images, ranks, size, batches):
    """Not of all images together: 29 images fill 3 x 9 + 2, yet with 10 a rank none."""
    assert batches_per_epoch(images, ranks, size) == batches


def test_arguments_out_of_range_are_refused(packed):
    for change, complaint in (
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank: must be less than world_size=2, got 2"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"min_images_per_identity": 0}, "min_images_per_identity: must be at least 1, got 0"),
    ):
        with pytest.raises(DataError, match=complaint):
            FaceLoader(packed, **{"batch_size": 2, **change})
    for wrong in ({"flip": 1.5}, {"shift_px": -1}, {"brightness": 2.0}):
        with pytest.raises(DataError, match=r"augment\.\w+: must lie in"):
            Augment(**wrong)


def test_a_gpu_that_is_not_there_is_refused(packed):
    with pytest.raises(DataError, match=r"device_id: 99, but torch sees \d+ GPUs"):
        FaceLoader(packed, 2, device_id=99)


@pytest.mark.parametrize("rank", [0, 1])
def test_small_identities_are_left_out_and_the_others_numbered_densely(packed, rank, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loader = FaceLoader(packed, 4, rank=rank, world_size=2, min_images_per_identity=4, augment=PLAIN)
    assert (loader.num_classes, loader.num_images, loader.steps_per_epoch) == (4, 26, 3)  # a, c, e, f of 7, 9, 6, 4
    kept = [0, 2, 4, 5]
    for batch in take(loader, 6):
        assert [kept[label] for label in batch.labels.tolist()] == [label_of(image.numpy()) for image in batch.images]
    assert not os.listdir(tmp_path)  # the index for DALI is gone once DALI has read it


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def stored_labels(shards, index):
    return fn.readers.mxnet(path=shards, index_path=[index])[1]


@pytest.mark.parametrize("keep", [[0, 1, 8, 9], [8, 9, 10, 11], [0, 5, 11], [11], [4, 5, 6]])
def test_reader_indexes_may_leave_out_shards_and_end_anywhere(tmp_path, keep):
    """DALI finds the wrong file when an index skips a shard, or ends with a lone record in the last one."""
    faces = open_set(numbered_set(tmp_path, [4, 4, 4]))
    shards = faces.write_reader_index(tmp_path / "kept.idx", np.isin(np.arange(12), keep))
    assert shards == sorted({faces.shards[i // 4] for i in keep})
    pipeline = stored_labels([str(shard) for shard in shards], str(tmp_path / "kept.idx"))
    found = [int(np.array(pipeline.run()[0][0])[0]) for _ in keep]
    assert found == faces.labels[keep].tolist()


@pytest.mark.parametrize("header", [True, False])
def test_field_sets_are_read_as_they_are(tmp_path, header):
    records = field_records([5, 0, 4, 3])
    write_records(tmp_path / "train.rec", records if header else [record for record in records if record[2]], shuffle=2)
    loader = FaceLoader(tmp_path, 4, augment=PLAIN)
    assert (loader.num_images, loader.num_classes) == (12, 4)
    seen = []
    for batch in take(loader, 3):
        assert [label_of(image.numpy()) for image in batch.images] == batch.labels.tolist()
        seen += batch.labels.tolist()
    assert sorted(seen) == [0] * 5 + [2] * 4 + [3] * 3


def test_records_with_several_labels_and_with_magic_inside_are_read(tmp_path):
    plain = jpeg(colour_of(2))
    comment = b"\xff\xfe\x00\x10xx" + MAGIC + b"." * 8  # a JPEG comment whose magic is aligned in the payload
    with_magic = plain[:2] + comment + plain[2:]
    with RecordWriter(tmp_path / "a.rec", tmp_path / "a.idx") as writer:
        writer.write(0, [1.0, 5.0, 7.0], jpeg(colour_of(1)))
        writer.write(1, 2.0, with_magic)
        writer.write(2, [0.0, 3.0], jpeg(colour_of(0)))
    assert (tmp_path / "a.rec").read_bytes().count(MAGIC) == 4  # the second record is in two parts
    (batch,) = take(FaceLoader(tmp_path, 3, augment=PLAIN), 1)
    assert sorted(batch.labels.tolist()) == [0, 1, 2]
    assert [label_of(image.numpy()) for image in batch.images] == batch.labels.tolist()


def test_a_label_out_of_range_in_a_packed_set_stops_the_batch(packed, tmp_path):
    pack(packed.parent / "src", tmp_path / "set", 1)
    shard = tmp_path / "set" / "shard_00000.rec"
    body = bytearray(shard.read_bytes())
    body[12:16] = np.float32(17).tobytes()
    shard.write_bytes(body)
    with pytest.raises(
        DataError, match=r"set: rank 0, step \d: shard_00000\.rec offset 0 \(key 0\): label 17, expected .* in \[0, 6\): .*verify"
    ):
        take(FaceLoader(tmp_path / "set", 4), 7)


@pytest.mark.parametrize("kind", ["image bytes", "magic"])
def test_a_record_that_dali_cannot_read_is_reported_with_set_rank_step_and_remedy(packed, tmp_path, kind):
    pack(packed.parent / "src", tmp_path / "set", 1)
    shard = tmp_path / "set" / "shard_00000.rec"
    body = bytearray(shard.read_bytes())
    at = 0 if kind == "magic" else 8 + 24
    body[at : at + 200] = b"\x55" * 200 if kind != "magic" else body[1:201]
    shard.write_bytes(body)
    with pytest.raises(DataError, match=r"set: rank 1, step \d+, or one of the next few.*python -m data_pipeline verify .*set` names it"):
        take(FaceLoader(tmp_path / "set", 4, rank=1, world_size=2, augment=PLAIN), 8)


@pytest.mark.parametrize("augment", [PLAIN, ALL])
def test_an_image_of_another_size_is_refused(tmp_path, augment):
    write_records(tmp_path / "train.rec", [(key, 0.0, jpeg(side=112 if key else 128)) for key in range(4)])
    with pytest.raises(DataError, match=r"rank 0, step 1: train\.rec offset 0 \(key 0\): an image of 128x128 pixels, expected 112x112"):
        next(FaceLoader(tmp_path, 4, augment=augment))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: decoding on a GPU was not compared with the CPU")
def test_a_gpu_decodes_what_the_cpu_decodes(packed):
    on_cpu = take(FaceLoader(packed, 5, augment=PLAIN), 12)
    on_gpu = take(FaceLoader(packed, 5, augment=PLAIN, device_id=0), 12)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu.images.device.type == gpu.labels.device.type == "cuda"
        assert torch.equal(cpu.labels, gpu.labels.cpu())
        assert cpu.records() == gpu.records()
        assert (cpu.images - gpu.images.cpu()).abs().max() <= 4.01 / 127.5
