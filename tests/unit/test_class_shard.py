import itertools

import pytest
import torch

from model.class_shard import ClassShard, _class_keys, initial_centers, sample_centers


@pytest.mark.parametrize(("num_classes", "world_size"), [(10, 1), (10, 3), (2, 3), (64, 64), (2_059_906, 64)])
def test_shards_partition_the_classes_and_the_first_ranks_own_one_more(num_classes, world_size):
    shards = [ClassShard(num_classes, rank, world_size) for rank in range(world_size)]
    assert shards[0].start == 0
    assert shards[-1].stop == num_classes
    assert all(left.stop == right.start for left, right in itertools.pairwise(shards))
    assert [len(s) for s in shards] == sorted((len(s) for s in shards), reverse=True)
    assert len(shards[0]) - len(shards[-1]) <= 1


def test_localize_marks_labels_of_other_ranks():
    assert ClassShard(10, 1, 3).localize(torch.tensor([0, 4, 6, 7, 9])).tolist() == [-1, 0, 2, -1, -1]


def test_initial_centers_do_not_depend_on_the_world_size():
    whole = initial_centers(ClassShard(9000, 0, 1), 4, seed=3)
    parts = torch.cat([initial_centers(ClassShard(9000, rank, 7), 4, seed=3) for rank in range(7)])
    assert torch.equal(whole, parts)
    assert whole.std().item() == pytest.approx(0.01, rel=0.02)
    assert not torch.equal(whole[:4096], whole[4096:8192])
    assert not torch.equal(whole, initial_centers(ClassShard(9000, 0, 1), 4, seed=4))


def test_sampled_centers_always_include_positives_and_are_sorted_and_distinct():
    labels = torch.tensor([507, 507, 999, 500, 12])
    shards = [ClassShard(1000, rank, 2) for rank in range(2)]
    rows = [sample_centers(shard, labels, 0.1, seed=0, step=5) for shard in shards]
    classes = torch.cat([part + shard.start for part, shard in zip(rows, shards, strict=True)])
    assert classes.numel() == 100
    assert set(labels.tolist()) <= set(classes.tolist())
    assert torch.equal(classes, classes.unique())


@pytest.mark.parametrize("num_positives", [19, 20, 21, 100])
def test_all_positives_are_kept_when_they_outnumber_the_sample(num_positives):
    positives = torch.arange(0, 200, 2)[:num_positives]
    rows = sample_centers(ClassShard(200, 0, 1), positives, 0.1, seed=0, step=0)
    assert len(rows) == max(20, num_positives)
    assert set(positives.tolist()) <= set(rows.tolist())


@pytest.mark.parametrize("world_size", [2, 7, 64])
@pytest.mark.parametrize("num_classes", [1000, 50])
def test_the_sampled_classes_do_not_depend_on_the_world_size(num_classes, world_size):
    labels = torch.tensor([3, 49, 3])
    whole = sample_centers(ClassShard(num_classes, 0, 1), labels, 0.3, seed=1, step=2)
    shards = [ClassShard(num_classes, rank, world_size) for rank in range(world_size)]
    assert torch.equal(whole, torch.cat([sample_centers(shard, labels, 0.3, seed=1, step=2) + shard.start for shard in shards]))


def test_the_draw_depends_on_seed_and_step_and_not_on_call_history():
    shard, none = ClassShard(5000, 0, 1), torch.empty(0, dtype=torch.int64)
    draw = sample_centers(shard, none, 0.3, seed=1, step=2)
    assert torch.equal(draw, sample_centers(shard, none, 0.3, seed=1, step=2))
    for other in (sample_centers(shard, none, 0.3, seed=2, step=2), sample_centers(shard, none, 0.3, seed=1, step=3)):
        common = len(set(draw.tolist()) & set(other.tolist()))
        assert common == pytest.approx(0.3 * 1500, abs=60), "two draws must be independent"  # hypergeometric: standard deviation 18


def test_class_keys_differ_and_fill_their_range_evenly():
    keys = _class_keys(2_059_906, 2**62 + 12345, torch.device("cpu"))
    assert keys.unique().numel() == 2_059_906
    counts = torch.histc(keys.double(), 64, min=-(2.0**31), max=2.0**31)
    assert counts.std() < 1.5 * counts.mean().sqrt()  # of independent draws: 1.0


def test_an_empty_shard_samples_nothing():
    assert sample_centers(ClassShard(2, 2, 3), torch.empty(0, dtype=torch.int64), 0.5, seed=0, step=0).numel() == 0
