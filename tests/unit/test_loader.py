import gc
import json
import os
from functools import partial

import pytest
import torch

from data_pipeline.augment import Augment
from data_pipeline.errors import DataError
from data_pipeline.graph import PREFETCH
from data_pipeline.loader import FaceLoader
from data_pipeline.pack import pack
from data_pipeline.recordio import RecordWriter
from tests.unit.loading import ALL, PLAIN, decoded, nearest, numbered_set, record_named, same, take
from tests.unit.record_sets import MAGIC, colour_of, field_records, jpeg, label_of, write_records


@pytest.fixture(params=["table", "reader"])
def face_loader(request):
    """What both backends promise is tested with both."""
    return partial(FaceLoader, backend=request.param, num_threads=1)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 1), (2, 3), (3, 1), (3, 3), (3, 2), (4, 2)])
def test_in_every_epoch_no_image_is_read_twice_and_ranks_read_equally(face_loader, tmp_path, shards, world_size, batch_size):
    """10 images: shares of 10, 5 + 5, 3 + 3 + 4, 2 + 3 + 2 + 3. DALI's own epochs read images twice where shares differ."""
    path = numbered_set(tmp_path, shards, images=10)
    loaders = [face_loader(path, batch_size, rank=rank, world_size=world_size, augment=PLAIN) for rank in range(world_size)]
    assert {loader.batches_per_epoch for loader in loaders} == {10 // world_size // batch_size}
    seen_ever = set()
    for epoch in range(5):
        batches = [batch for loader in loaders for batch in take(loader, loader.batches_per_epoch)]
        seen = [label for batch in batches for label in batch.labels.tolist()]
        assert {batch.epoch for batch in batches} == {epoch}
        assert len(seen) == len(set(seen)) == world_size * loaders[0].batches_per_epoch * batch_size
        seen_ever |= set(seen)
    assert seen_ever == set(range(10))  # what one epoch leaves out, another reads


def test_the_order_changes_with_the_epoch_and_the_seed(face_loader, packed_people):
    def order(seed, batches):
        return [label for batch in take(face_loader(packed_people, 4, seed=seed), batches) for label in batch.labels.tolist()]

    first = order(0, 14)
    assert first == order(0, 14)
    assert first[:28] != first[28:]
    assert first != order(1, 14)


def test_shapes_types_range_and_labels_belong_to_the_images(face_loader, packed_people):
    loader = face_loader(packed_people, 5, augment=PLAIN)
    assert (loader.num_images, loader.num_classes, loader.batches_per_epoch) == (29, 6, 5)
    for step, batch in enumerate(take(loader, 11), start=1):
        assert (batch.images.shape, batch.images.dtype) == ((5, 3, 112, 112), torch.float32)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.labels.shape, batch.labels.dtype) == ((5,), torch.int64)
        assert (batch.step, batch.epoch) == (step, (step - 1) // 5)
        assert -1 <= batch.images.min() < batch.images.max() <= 1
        assert [label_of(image.numpy()) for image in batch.images] == batch.labels.tolist()


@pytest.mark.faces
def test_pixels_equal_those_of_another_decoder_on_real_faces(face_loader, faces):
    images, labels = decoded(faces / "records")
    for batch in take(face_loader(faces / "records", 4, augment=PLAIN), 4):
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            best, worst = nearest(image, images)
            assert labels[best] == label
            assert worst <= 2.01 / 127.5  # two JPEG decoders may differ by a grey level or two


def test_images_stay_what_they_were_while_the_loader_reads_on(face_loader, packed_people):
    loader = face_loader(packed_people, 5, augment=ALL)
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


def test_a_batch_names_its_records_whenever_it_is_asked(face_loader, packed_people):
    """Also when the loader has read on, and is gone, and the tensors are gone; after a resume; on every rank."""
    for rank in range(2):
        loader = face_loader(packed_people, 3, rank=rank, world_size=2, augment=ALL)
        batches = take(loader, 6)
        resumed = face_loader(packed_people, 3, rank=rank, world_size=2, augment=ALL, state=loader.state())
        batches += take(resumed, 6)
        labels, asks = [batch.labels.tolist() for batch in batches], [batch.records for batch in batches]
        at_once = asks[0]()
        take(resumed, 20)
        del loader, resumed, batches
        gc.collect()
        assert asks[0]() == at_once
        for ask, expected in zip(asks, labels, strict=True):
            named = [record_named(packed_people, name) for name in ask()]
            assert [record.labels[0] for _, record in named] == expected
            assert all(key == record.id for key, record in named)  # pack writes the key into the record
        assert len(set(at_once)) == 3


def test_records_of_a_field_set_keep_the_keys_of_its_index(face_loader, tmp_path):
    """The index is shuffled, its keys begin at 1, and DALI reads another index that leaves out the records without an image."""
    records = field_records([5, 0, 4, 3])
    offsets = write_records(tmp_path / "train.rec", records, shuffle=2)
    keys = {offset: key for (key, _, _), offset in zip(records, offsets, strict=True)}
    for batch in take(face_loader(tmp_path / "train.rec", 4), 6):
        named = [record_named(tmp_path, name) for name in batch.records()]
        assert [record.labels[0] for _, record in named] == batch.labels.tolist()
        assert all(keys[record.offset] == key for key, record in named)


def test_records_are_named_where_small_identities_are_left_out(face_loader, packed_people):
    kept = [0, 2, 4, 5]
    for batch in take(face_loader(packed_people, 4, min_images_per_identity=4), 6):
        labels = [record_named(packed_people, name)[1].labels[0] for name in batch.records()]
        assert labels == [kept[label] for label in batch.labels.tolist()]


def test_records_of_a_set_given_by_a_relative_path_are_named(face_loader, packed_people, monkeypatch):
    monkeypatch.chdir(packed_people.parent)
    batch = next(face_loader("set", 4))
    assert [record_named(packed_people, name)[1].labels[0] for name in batch.records()] == batch.labels.tolist()


@pytest.mark.parametrize("at", [0, 1, 6, 7, 8, 14, 20])
def test_a_resumed_loader_continues_bit_for_bit(face_loader, packed_people, at):
    def arguments(threads):
        return {"rank": 1, "world_size": 2, "augment": ALL, "seed": 3, "num_threads": threads}

    loader = face_loader(packed_people, 2, **arguments(1))
    assert loader.batches_per_epoch == 7
    take(loader, at)
    state = json.loads(json.dumps(loader.state()))
    assert state["images"] == 4 * at  # over both ranks
    expected = take(loader, 16)
    resumed = face_loader(packed_people, 2, **arguments(2), state=state)
    assert same(take(resumed, 5), expected[:5])
    again = face_loader(packed_people, 2, **arguments(2), state=resumed.state())  # the state of a resumed run is as good
    assert same(take(again, 11), expected[5:])
    assert same(take(resumed, 11), expected[5:])


def test_the_state_of_another_run_is_refused_with_both_values(face_loader, packed_people, tmp_path):
    state = face_loader(packed_people, 2).state()
    for change, complaint in (
        ({"batch_size": 4}, "global_batch_size: 2 in the state, 4 here"),
        ({"seed": 9}, "seed: 0 in the state, 9 here"),
        ({"augment": Augment(flip=0.1)}, r"augment\.flip: 0\.5 in the state, 0\.1 here"),
        ({"min_images_per_identity": 2}, "num_images: 29 in the state, 28 here; num_classes: 6 in the state, 5 here"),
    ):
        with pytest.raises(DataError, match=complaint):
            face_loader(packed_people, **{"batch_size": 2, **change}, state=state)
    pack([packed_people.parent / "src"], tmp_path / "other", 3, seed=5)
    with pytest.raises(DataError, match=r"set: '[0-9a-f]{64}' in the state, '[0-9a-f]{64}' here\)"):
        face_loader(tmp_path / "other", 2, state=state)
    with pytest.raises(DataError, match=r"expected what FaceLoader\.state"):
        face_loader(packed_people, 2, state={"step": 3})


def test_more_ranks_than_batches_is_refused_with_the_numbers(face_loader, packed_people):
    with pytest.raises(DataError, match=r"num_images=29 is less than one global batch of 32 \(world_size=8, batch_size=4\)"):
        face_loader(packed_people, 4, world_size=8)
    with pytest.raises(DataError, match=r"num_images=0 with min_images_per_identity=50 is less"):
        face_loader(packed_people, 4, min_images_per_identity=50)


def test_a_set_of_another_size_than_expected_is_refused_with_both_numbers(face_loader, packed_people):
    face_loader(packed_people, 4, expected_images=29, expected_classes=6)
    face_loader(packed_people, 4, min_images_per_identity=2, expected_images=28, expected_classes=5)
    with pytest.raises(DataError, match=r"data\.num_images: 30 expected, but .*set has 29: mend data\.path or data\.num_images"):
        face_loader(packed_people, 4, expected_images=30)
    with pytest.raises(DataError, match=r"data\.num_classes: 6 expected, but .*set with min_images_per_identity=2 has 5: "):
        face_loader(packed_people, 4, min_images_per_identity=2, expected_images=28, expected_classes=6)


def test_arguments_out_of_range_are_refused(face_loader, packed_people):
    for change, complaint in (
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
        ({"global_batch_size": 0}, "global_batch_size: must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank: must be less than world_size=2, got 2"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"min_images_per_identity": 0}, "min_images_per_identity: must be at least 1, got 0"),
    ):
        with pytest.raises(DataError, match=complaint):
            face_loader(packed_people, **{"batch_size": 2, **change})
    for wrong in ({"flip": 1.5}, {"shift_px": -1}, {"brightness": 2.0}):
        with pytest.raises(DataError, match=r"augment\.\w+: must lie in"):
            Augment(**wrong)


def test_a_gpu_that_is_not_there_is_refused(face_loader, packed_people):
    with pytest.raises(DataError, match=r"device_id: 99, but torch sees \d+ GPUs"):
        face_loader(packed_people, 2, device_id=99)


@pytest.mark.parametrize("rank", [0, 1])
def test_small_identities_are_left_out_and_the_others_numbered_densely(face_loader, packed_people, rank, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loader = face_loader(packed_people, 4, rank=rank, world_size=2, min_images_per_identity=4, augment=PLAIN)
    assert (loader.num_classes, loader.num_images, loader.batches_per_epoch) == (4, 26, 3)  # a, c, e, f of 7, 9, 6, 4
    kept = [0, 2, 4, 5]
    for batch in take(loader, 6):
        assert [kept[label] for label in batch.labels.tolist()] == [label_of(image.numpy()) for image in batch.images]
    assert not os.listdir(tmp_path)  # the index for DALI is gone once DALI has read it


@pytest.mark.parametrize("header", [True, False])
def test_field_sets_are_read_as_they_are(face_loader, tmp_path, header):
    records = field_records([5, 0, 4, 3])
    write_records(tmp_path / "train.rec", records if header else [record for record in records if record[2]], shuffle=2)
    loader = face_loader(tmp_path, 4, augment=PLAIN)
    assert (loader.num_images, loader.num_classes) == (12, 4)
    seen = []
    for batch in take(loader, 3):
        assert [label_of(image.numpy()) for image in batch.images] == batch.labels.tolist()
        seen += batch.labels.tolist()
    assert sorted(seen) == [0] * 5 + [2] * 4 + [3] * 3


def test_records_with_several_labels_and_with_magic_inside_are_read(face_loader, tmp_path):
    plain = jpeg(colour_of(2))
    comment = b"\xff\xfe\x00\x10xx" + MAGIC + b"." * 8  # a JPEG comment whose magic is aligned in the payload
    with_magic = plain[:2] + comment + plain[2:]
    with RecordWriter(tmp_path / "a.rec", tmp_path / "a.idx") as writer:
        writer.write(0, [1.0, 5.0, 7.0], jpeg(colour_of(1)))
        writer.write(1, 2.0, with_magic)
        writer.write(2, [0.0, 3.0], jpeg(colour_of(0)))
    assert (tmp_path / "a.rec").read_bytes().count(MAGIC) == 4  # the second record is in two parts
    (batch,) = take(face_loader(tmp_path, 3, augment=PLAIN), 1)
    assert sorted(batch.labels.tolist()) == [0, 1, 2]
    assert [label_of(image.numpy()) for image in batch.images] == batch.labels.tolist()


def test_bytes_read_are_those_of_the_images_fed_to_the_pipeline(packed_people):
    names = [name for batch in take(FaceLoader(packed_people, 5, augment=PLAIN), 3 + PREFETCH) for name in batch.records()]
    loader = FaceLoader(packed_people, 5, augment=PLAIN)
    take(loader, 3)
    assert loader.bytes_read == sum(len(record_named(packed_people, name)[1].image) for name in names)
    assert loader.batches_ahead >= PREFETCH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: decoding on a GPU was not compared with the CPU")
def test_a_gpu_decodes_what_the_cpu_decodes(face_loader, packed_people):
    on_cpu = take(face_loader(packed_people, 5, augment=PLAIN), 12)
    on_gpu = take(face_loader(packed_people, 5, augment=PLAIN, device_id=0), 12)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu.images.device.type == gpu.labels.device.type == "cuda"
        assert torch.equal(cpu.labels, gpu.labels.cpu())
        assert cpu.records() == gpu.records()
        assert (cpu.images - gpu.images.cpu()).abs().max() <= 4.01 / 127.5
