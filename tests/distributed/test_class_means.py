"""Class centers that begin as class means: against numpy in float64, on one to three ranks, and in a run of every ZeRO stage."""

import contextlib
import io
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from data_pipeline.augment import Augment
from data_pipeline.loader import FaceLoader
from data_pipeline.one_pass import OnePass
from model.class_means import ClassMeans
from model.class_shard import ClassShard, initial_centers, mean_initial_norm
from model.collectives import Collectives
from model.vit import build_vit
from tests.ranks import run_ranks
from tests.training import IDENTITIES, given_weights, packed_faces, train_on_rank, write_recipe
from train.backbone import TrainedBackbone

D, BATCHES, B = 6, 3, 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_faces(tmp_path_factory.mktemp("shards"))


def samples(rank, batch, num_classes):
    """[B, D] embeddings of very different norms, and [B] labels, of which some mark no image."""
    rng = np.random.default_rng([rank, batch])
    embeddings = rng.normal(size=(B, D)) * 10.0 ** rng.integers(-3, 4, size=(B, 1))
    return embeddings.astype(np.float32), rng.integers(-1, max(1, num_classes - 1), size=B)  # the last of several classes has none


def means_of_a_rank(group, num_classes):
    rank, ranks = dist.get_rank(group), Collectives(group)
    shard = ClassShard(num_classes, ranks.rank, ranks.world_size)
    means = ClassMeans(shard, D, ranks)
    for batch in range(BATCHES):
        embeddings, labels = samples(rank, batch, num_classes)
        embeddings[labels < 0] = math.nan  # what stands there must not matter
        means.add(torch.from_numpy(embeddings), torch.from_numpy(labels))
    return means.centers(initial_centers(shard, D, 0)).numpy(), means.counts()


def reference(world_size, num_classes):
    """Centers, images, and classes with images: sample by sample."""
    sums, images = np.zeros((num_classes, D)), np.zeros(num_classes, int)
    for rank in range(world_size):
        for batch in range(BATCHES):
            for embedding, label in zip(*samples(rank, batch, num_classes), strict=True):
                if label >= 0:
                    sums[label] += embedding.astype(np.float64) / np.linalg.norm(embedding.astype(np.float64))
                    images[label] += 1
    centers = initial_centers(ClassShard(num_classes, 0, 1), D, 0).double().numpy()
    for label in np.flatnonzero(images):
        mean = sums[label] / images[label]
        centers[label] = mean / np.linalg.norm(mean) * 0.01 * math.sqrt(2) * math.gamma((D + 1) / 2) / math.gamma(D / 2)
    return centers, images.sum(), (images > 0).sum()


@pytest.mark.parametrize(("world_size", "num_classes"), [(1, 7), (2, 7), (3, 7), (3, 2), (2, 1), (3, 6)])  # uneven, and empty shards
def test_centers_are_the_means_of_unit_embeddings_whichever_rank_has_them(world_size, num_classes):
    parts = run_ranks(world_size, means_of_a_rank, num_classes)
    centers, images, classes = reference(world_size, num_classes)
    assert np.concatenate([rows for rows, _ in parts]) == pytest.approx(centers, rel=1e-5, abs=1e-9)
    assert [counts for _, counts in parts] == [(images, classes, 0)] * world_size


def test_a_class_whose_embeddings_cancel_out_keeps_its_random_center():
    shard = ClassShard(2, 0, 1)
    means, initial = ClassMeans(shard, D, Collectives(None)), initial_centers(shard, D, 0)
    means.add(torch.eye(D)[:1].repeat(2, 1) * torch.tensor([[1.0], [-3.0]]), torch.tensor([1, 1]))
    assert torch.equal(means.centers(initial), initial)


def test_embeddings_that_are_not_finite_are_counted():
    means = ClassMeans(ClassShard(2, 0, 1), D, Collectives(None))
    means.add(torch.tensor([[math.nan] * D, [1.0] * D, [math.inf] * D]), torch.tensor([0, 1, -1]))
    assert means.counts() == (2, 2, 1)


@pytest.mark.parametrize("size", [1, 2, 32, 512])
def test_the_stated_norm_is_the_mean_norm_of_random_centers(size):
    norms = initial_centers(ClassShard(20_000, 0, 1), size, 0).double().norm(dim=1)
    assert mean_initial_norm(size) == pytest.approx(float(norms.mean()), rel=4 * float(norms.std() / norms.mean()) / math.sqrt(20_000))


def pixels_by_label(batches):
    """Sorted (label, pixels) of all rows that are images."""
    found = [(int(label), image.numpy().tobytes()) for images, labels in batches for image, label in zip(images, labels, strict=True)]
    return sorted(row for row in found if row[0] >= 0)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 7), (3, 5), (5, 50)])
def test_over_all_ranks_every_image_comes_once_as_it_is(world_size, batch_size, shards):
    passes = [OnePass(shards, batch_size, rank=rank, world_size=world_size, num_threads=1) for rank in range(world_size)]
    assert {len(one) for one in passes} == {-(-96 // (batch_size * world_size))}
    loader = FaceLoader(shards, 96, num_threads=1, augment=Augment(flip=0.0))
    batch = next(loader)
    expected = pixels_by_label([(batch.images, batch.labels)])
    assert len(expected) == 96
    assert pixels_by_label(part for one in passes for part in one) == expected


def test_a_damaged_record_is_left_out_of_the_pass_and_nothing_else(tmp_path):
    folder = packed_faces(tmp_path)
    record = next(folder.glob("*.rec"))
    data = bytearray(record.read_bytes())
    data[200] ^= 1
    record.write_bytes(data)
    one = OnePass(folder, 10, num_threads=1)
    labels = torch.cat([labels for _, labels in one])
    assert int((labels >= 0).sum()) == 95
    assert len(one.bad_records) == 1


FINE = {"stages": [{"name": "head", "steps": 1, "freeze_backbone": True}], "schedule": {}, "optimizer": {"lr": 1e-12}}


def trained_centers(output, world_size):
    states = [torch.load(output / f"checkpoints/step_00000001/rank_{rank:05d}.pt", weights_only=True)["head"] for rank in range(world_size)]
    return torch.cat([state["weight"] for state in states])


@pytest.mark.parametrize(
    ("world_size", "ds_config"),
    [(1, "zero1_fp32.json"), (2, "zero3_fp32.json"), pytest.param(3, "zero2_fp32.json", marks=pytest.mark.slow)],
)
def test_a_run_begins_with_the_class_means_of_its_initial_backbone(world_size, ds_config, shards, tmp_path):
    """The one step that it takes moves no center by more than the learning rate, 1e-12."""
    recipe = write_recipe(tmp_path / "r.yaml", shards, tmp_path / "run", **FINE, batch={"micro_batch_size": 7})
    given, weights = given_weights(tmp_path)
    run_ranks(world_size, train_on_rank, recipe, ds_config, ["head.init_centers=class_means", given])
    net = build_vit("vit_xxt", embedding_size=32)
    net.load_state_dict(load_file(weights))
    net = net.eval().double()
    # BatchNorm's parameters are float64 here, but it computes in float32, as it always does.
    batch = next(FaceLoader(shards, 96, num_threads=1, augment=Augment(flip=0.0)))
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    with torch.no_grad():
        embeddings = net(batch.images).double().numpy()
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    sums = np.stack([unit[batch.labels.numpy() == label].sum(0) for label in range(IDENTITIES)])
    expected = sums / np.linalg.norm(sums, axis=1, keepdims=True) * mean_initial_norm(32)
    assert trained_centers(tmp_path / "run", world_size).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_pass_draws_no_random_number_and_moves_no_statistic(shards, tmp_path):
    states = []
    for choice in ("random", "class_means"):
        recipe = write_recipe(tmp_path / f"{choice}.yaml", shards, tmp_path / choice, **FINE)
        run_ranks(1, train_on_rank, recipe, "zero1_fp32.json", [f"head.init_centers={choice}", given_weights(tmp_path)[0]])
        states.append(torch.load(tmp_path / choice / "checkpoints/step_00000001/rank_00000.pt", weights_only=True))
    first, second = states
    assert torch.equal(first["random"]["torch"], second["random"]["torch"])
    assert torch.equal(first["random"]["numpy"][1], second["random"]["numpy"][1])
    assert all(torch.equal(buffer, second["buffers"][name]) for name, buffer in first["buffers"].items())
    assert first["loader"]["images"] == second["loader"]["images"]
    assert not torch.equal(first["head"]["weight"], second["head"]["weight"])


def last_state(output, rank):
    return torch.load(output / f"checkpoints/step_00000004/rank_{rank:05d}.pt", weights_only=True)


@pytest.mark.parametrize(
    ("world_size", "ds_config"),
    [(1, "zero2_bf16.json"), (2, "zero3_fp32.json"), pytest.param(2, "zero1_fp32.json", marks=pytest.mark.slow)],
)
def test_a_run_that_is_killed_after_the_pass_goes_on_from_it_bit_for_bit(world_size, ds_config, shards, tmp_path):
    """Step 0 is saved; of it alone the rest follows, without another pass."""
    stages = [{"name": "head", "steps": 2, "freeze_backbone": True}, {"name": "all", "steps": 2}]
    changes = {"stages": stages, "checkpoint": {"every_steps": 4, "keep_last": 9}, "batch": {"micro_batch_size": 8 // world_size}}
    outputs = [tmp_path / name for name in ("whole", "resumed")]
    recipes = [write_recipe(tmp_path / f"{output.name}.yaml", shards, output, **changes) for output in outputs]
    given, weights = given_weights(tmp_path)
    run_ranks(world_size, train_on_rank, recipes[0], ds_config, ["head.init_centers=class_means", given])
    start = "checkpoints/step_00000000"
    shutil.copytree(outputs[0] / start, outputs[1] / start)
    weights.unlink()  # neither the weights nor the pass are needed again
    assert run_ranks(world_size, train_on_rank, recipes[1], ds_config, ["head.init_centers=class_means", given]) == [4] * world_size
    manifest = json.loads((outputs[1] / start / "manifest.json").read_text())
    assert (manifest["step"], manifest["score"], manifest["run"]["origin"]["file"]) == (0, None, str(weights))
    names = ["backbone.safetensors", "backbone_ema.safetensors"]
    files = [[(output / "checkpoints/step_00000004" / name).read_bytes() for name in names] for output in outputs]
    assert files[0] == files[1]
    for rank in range(world_size):
        first, second = (last_state(output, rank) for output in outputs)
        assert torch.equal(first["head"]["weight"], second["head"]["weight"])
        assert torch.equal(first["random"]["torch"], second["random"]["torch"])


def train_with_a_bad_step(group, recipe, overrides):
    """The embeddings of step 2 are not finite, once; returns the steps and what rank 0 says."""
    embed, steps = TrainedBackbone.__call__, itertools.count(1)

    def spoiled(backbone, images):
        embeddings = embed(backbone, images)
        return embeddings * math.nan if next(steps) == 2 else embeddings

    TrainedBackbone.__call__ = spoiled
    with contextlib.redirect_stdout(io.StringIO()) as said:
        steps_done = train_on_rank(group, recipe, "zero1_fp32.json", overrides)
    return steps_done, said.getvalue()


@pytest.mark.parametrize("centers", ["learned", "vpl"])
def test_a_run_can_go_back_to_the_end_of_the_pass(centers, shards, tmp_path):
    changes = {
        "stages": [{"name": "only", "steps": 4, "centers": centers}],
        "head": {"margin": {"m3": 0.2}, "scale": 16.0},
        "checkpoint": {"every_steps": 99},
        "batch": {"micro_batch_size": 8},
        "guard": {"max_skipped": 1, "then": "rollback"},
    }
    recipe = write_recipe(tmp_path / "r.yaml", shards, tmp_path / "run", **changes)
    overrides = ["head.init_centers=class_means", given_weights(tmp_path)[0]]
    ((steps, said),) = run_ranks(1, train_with_a_bad_step, recipe, overrides)
    assert steps == 4
    assert "rollback 1 of" in said
    assert "step_00000000; the next images follow" in said
