"""The order by itself, with integers alone: at the size of WebFace42M and 64 ranks, and where it can be counted out."""

import math
from collections import Counter

import numpy as np
import pytest

from data_pipeline.order import EpochOrder, uniforms

WEBFACE, RANKS, MICRO_BATCH = 42_474_557, 64, 384
BLOCK = 1 << 18


def all_images(order, epoch):
    """Every image of an epoch in its order, a block at a time."""
    for start in range(0, order.num_images, BLOCK):
        yield order.images(epoch, np.arange(start, min(start + BLOCK, order.num_images)))


@pytest.mark.parametrize("num_images", [1, 2, 3, 4, 5, 7, 10, 64, 97, 1000, 65_537, 300_000])
def test_an_epoch_holds_every_image_once(num_images):
    order = EpochOrder(num_images, 1, seed=3)
    for epoch in (0, 1, 9):
        assert sorted(np.concatenate(list(all_images(order, epoch))).tolist()) == list(range(num_images))


def test_every_image_of_webface42m_comes_once_in_an_epoch():
    order, seen = EpochOrder(WEBFACE, RANKS * MICRO_BATCH, seed=7), np.zeros(WEBFACE, bool)
    for images in all_images(order, 11):
        assert not seen[images].any()
        seen[images] = True
    assert seen.all()


def test_64_ranks_share_the_global_batches_of_webface42m_without_overlap():
    """In the first, some middle and the last step of an epoch, on the boundary to the next, and with eight times fewer ranks."""
    order = EpochOrder(WEBFACE, RANKS * MICRO_BATCH, seed=7)
    assert order.steps_per_epoch == 1_728
    for step in (0, 1, 863, 1_727, 1_728, 3_456):
        epoch, in_epoch = divmod(step, 1_728)
        start = in_epoch * order.global_batch_size
        expected = order.images(epoch, np.arange(start, start + order.global_batch_size))
        assert len(set(expected.tolist())) == order.global_batch_size
        for world_size, micro_batches in ((64, 1), (8, 8), (16, 4), (1, 64)):
            shared = np.empty(order.global_batch_size, np.int64)
            for micro in range(micro_batches):
                read = step * order.global_batch_size + micro * MICRO_BATCH * world_size
                for rank in range(world_size):
                    found_epoch, positions = order.positions(read, MICRO_BATCH, rank, world_size)
                    assert found_epoch == epoch
                    shared[positions - start] = order.images(epoch, positions)
            assert np.array_equal(shared, expected)


def test_epochs_leave_out_other_images():
    order = EpochOrder(WEBFACE, RANKS * MICRO_BATCH, seed=7)
    tail = np.arange(order.images_per_epoch, WEBFACE)
    assert 0 < len(tail) < order.global_batch_size
    left_out = [set(order.images(epoch, tail).tolist()) for epoch in range(20)]
    assert all(len(images) == len(tail) for images in left_out)
    # Two random sets of n of N images share n^2 / N, here 1.2.
    shared = [len(one & other) for i, one in enumerate(left_out) for other in left_out[:i]]
    assert np.mean(shared) == pytest.approx(len(tail) ** 2 / WEBFACE, rel=0.25)


def chi_square(counts, expected):
    """Standard deviations that the statistic lies above its mean."""
    statistic, freedom = ((np.asarray(counts) - expected) ** 2 / expected).sum(), len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("num_images", [3, 4, 5])
def test_all_orders_of_few_images_are_equally_frequent(num_images):
    orders = math.factorial(num_images)
    epochs = 20 * orders
    order = EpochOrder(num_images, 1, seed=1)
    counts = Counter(tuple(order.images(epoch, np.arange(num_images)).tolist()) for epoch in range(epochs))
    assert len(counts) == orders
    assert chi_square(list(counts.values()), epochs / orders) < 4


@pytest.mark.parametrize("num_images", [17, 100, WEBFACE])
def test_an_image_is_read_at_any_time_of_an_epoch(num_images):
    """Sixteenths of the images against sixteenths of the epoch, over epochs and seeds."""
    table, rng = np.zeros((16, 16)), np.random.default_rng(0)
    expected = np.zeros((16, 16))
    for i in range(200):
        positions = rng.choice(num_images, min(num_images, 1000), replace=False) if num_images < 1e6 else rng.integers(0, num_images, 1000)
        images = EpochOrder(num_images, 1, seed=i % 7).images(i, positions)
        np.add.at(table, (positions * 16 // num_images, images * 16 // num_images), 1)
        parts = np.bincount(np.arange(num_images) * 16 // num_images, minlength=16) if num_images < 1e6 else np.ones(16)
        share = parts / parts.sum()
        expected += np.bincount(positions * 16 // num_images, minlength=16)[:, None] * share
    assert chi_square(table.ravel(), expected.ravel()) < 4


def test_neighbours_in_the_order_are_no_neighbours_in_the_set():
    order = EpochOrder(WEBFACE, 1, seed=0)
    images = order.images(0, np.arange(1 << 20)).astype(float)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 4 / math.sqrt(1 << 20)
    assert abs(np.corrcoef(np.arange(1 << 20), images)[0, 1]) < 4 / math.sqrt(1 << 20)
    assert (np.abs(np.diff(images)) < 1000).sum() < 100  # by chance 1 << 20 pairs x 2,000 / N = 49


def test_other_seeds_and_epochs_are_other_orders():
    positions = np.arange(5000)
    orders = [EpochOrder(WEBFACE, 1, seed).images(epoch, positions) for seed in (0, 1, 2**40) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() == 0
            assert len(np.intersect1d(one, other)) < 10  # by chance 5000^2 / N = 0.6


def test_substitutes_are_images_that_the_epoch_leaves_out_and_then_any():
    order = EpochOrder(103, 10, seed=2)
    for epoch in range(5):
        tail = set(order.images(epoch, np.arange(100, 103)).tolist())
        tried = np.stack([order.substitutes(epoch, position, 8) for position in range(40)])
        assert set(tried[:, :4].ravel().tolist()) == tail
        assert len(set(tried[:, 4:].ravel().tolist())) > 70  # 160 draws of 103 images meet 81 of them
    order = EpochOrder(100, 10, seed=2)
    found = {image for position in range(100) for image in order.substitutes(0, position, 16).tolist()}
    assert len(found) > 95
    assert order.substitutes(3, 17, 8).tolist() == order.substitutes(3, 17, 8).tolist() != order.substitutes(3, 18, 8).tolist()


def test_random_numbers_are_uniform_independent_and_belong_to_the_position():
    positions = np.arange(50_000)
    numbers = uniforms(3, 4, positions, 17)
    assert numbers.shape == (50_000, 17)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    for column in numbers.T:
        assert chi_square(np.histogram(column, 50, (0, 1))[0], 1000) < 4.5
    correlation = np.corrcoef(np.concatenate([numbers, uniforms(3, 5, positions, 17), uniforms(4, 4, positions, 17)], axis=1).T)
    assert np.abs(correlation - np.eye(51)).max() < 5 / math.sqrt(50_000)
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 5 / math.sqrt(50_000)
    shuffled = np.random.default_rng(0).permutation(50_000)
    assert np.array_equal(uniforms(3, 4, shuffled, 17), numbers[shuffled])
    assert np.array_equal(uniforms(3, 4, positions, 5), numbers[:, :5])
    assert not np.isin(uniforms(3, 4, positions[:100], 17, stream=1), numbers).any()
