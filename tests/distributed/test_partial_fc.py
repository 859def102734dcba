"""The sharded head against float64 on 1, 2 and 3 ranks: loss, feature gradient, center gradient, expectation, row-sparse AdamW."""

import pytest
import torch
import torch.distributed as dist

from model.partial_fc import PartialFC
from tests.ranks import run_ranks
from tests.reference import adamw_reference, expectation_reference, head_reference, relative_error

D, BATCH = 24, 12
EXACT = 5e-6  # relative norm; float32 keeps 6e-8 an operation and the scale multiplies the error of a cosine
MARGINS = {"cosface": (1.0, 0.0, 0.4), "arcface": (1.0, 0.5, 0.0), "combined": (1.2, 0.3, 0.1)}


def global_batch(num_classes, step=0, batch=BATCH):
    generator = torch.Generator().manual_seed(100 + step)
    labels = torch.randint(0, num_classes, (batch,), generator=generator)
    labels[: batch // 3] = labels[0]  # duplicates
    return torch.randn(batch, D, generator=generator) * 2.5, labels


def gather_rows(group, rows):
    """Rows of every rank in rank order, for shards of different sizes."""
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, rows, group=group)
    return torch.cat(parts)


def my_share(group, tensor):
    return tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


def check_gradients(group, num_classes, settings):
    """One training call on every rank against the reference on the global batch; the loss arrives scaled by 8 as under a loss scale."""
    head = PartialFC(D, num_classes, seed=7, group=group, **settings)
    weight = gather_rows(group, head.weight)
    if head.centers == "pco":
        own = torch.arange(len(head.shard))[::2]  # every second class of a rank was seen
        head._expectation.update(own, torch.nn.functional.normalize(torch.randn(own.numel(), D)))
    expectation, seen = gather_rows(group, head.expectation), gather_rows(group, head.expectation_seen)
    embeddings, labels = global_batch(num_classes)
    mine = my_share(group, embeddings).requires_grad_()
    loss = head(mine, my_share(group, labels))
    (loss * 8.0).backward()
    rows, grad = head.pending_gradient()
    local = torch.zeros_like(head.weight)
    local[rows] = grad
    scored = gather_rows(group, rows + head.class_start)
    expected = head_reference(
        embeddings,
        weight,
        labels,
        margin=settings["margin"],
        scale=settings["scale"],
        margin_gradient=settings["margin_gradient"],
        scored=scored.tolist(),
        **({"expectation": expectation, "seen": seen} if head.centers == "pco" else {}),
    )
    world_size = dist.get_world_size(group)
    assert relative_error(loss.detach(), expected.loss) < EXACT
    assert relative_error(gather_rows(group, mine.grad), expected.embeddings_grad * world_size * 8.0) < EXACT
    assert relative_error(gather_rows(group, local), expected.centers_grad) < EXACT
    assert abs(float(head.target_cosine) - expected.target_cosine) < 1e-6
    assert float(head.gradient_norm()) == pytest.approx(float(expected.centers_grad.norm()), rel=EXACT)
    if settings["sample_rate"] < 1:
        local_labels = head.shard.localize(labels).unique()
        positives = int((local_labels >= 0).sum())
        assert rows.numel() == max(int(settings["sample_rate"] * len(head.shard)), positives)
    return float(loss)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [42, 41, 2], ids=["even", "uneven", "fewer-classes-than-ranks"])
def test_sharded_loss_and_gradients_match_the_float64_reference(world_size, num_classes):
    settings = [
        dict(margin=margin, scale=32.0, margin_gradient=gradient, sample_rate=rate, centers=centers)
        for margin in MARGINS.values()
        for gradient in ("exact", "straight_through")
        for rate in (1.0, 0.4)
        for centers in ("learned", "pco")
    ]
    losses = run_ranks(world_size, check_all, num_classes, settings)
    assert all(per_rank == losses[0] for per_rank in losses), "the loss must be equal on every rank"


def check_all(group, num_classes, settings):
    return [check_gradients(group, num_classes, one) for one in settings]


@pytest.mark.parametrize("scale", [64.0, 128.0])
def test_large_scales_neither_overflow_nor_lose_precision(scale):
    settings = [
        dict(margin=(1.0, 0.5, 0.0), scale=scale, margin_gradient="exact", sample_rate=1.0, centers=centers)
        for centers in ("learned", "pco")
    ]
    run_ranks(2, check_all, 41, settings)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_steps_with_accumulation_and_sampling_match_row_sparse_adamw(world_size):
    run_ranks(world_size, check_steps, 41)


def check_steps(group, num_classes):
    """Four steps of two micro-batches each: centers by AdamW on the mean gradient, expectations from the samples of both."""
    head = PartialFC(D, num_classes, 0.3, (1.0, 0.0, 0.4), 16.0, group=group, seed=1)
    head.set_stage(sample_rate=0.3, centers="learned", update_expectation=True)
    start, history = gather_rows(group, head.weight), []
    expectation, seen = torch.zeros(num_classes, D), torch.zeros(num_classes, dtype=torch.bool)
    for step in range(4):
        weight, touched, grads, samples = gather_rows(group, head.weight), set(), torch.zeros(num_classes, D, dtype=torch.float64), []
        for micro in range(2):
            embeddings, labels = global_batch(num_classes, step=2 * step + micro)
            head(my_share(group, embeddings).requires_grad_(), my_share(group, labels)).backward()
            scored = gather_rows(group, head._pending[-1].rows + head.class_start)
            expected = head_reference(
                embeddings, weight, labels, margin=(1.0, 0.0, 0.4), scale=16.0, margin_gradient="exact", scored=scored.tolist()
            )
            grads += expected.centers_grad / 2
            touched |= set(scored.tolist())
            samples.append((embeddings, labels))
        rows, grad = head.pending_gradient()
        local = torch.zeros_like(head.weight)
        local[rows] = grad
        assert relative_error(gather_rows(group, local), grads) < EXACT
        head.step(lr=1e-2, weight_decay=0.1)
        history.append({row: grads[row] for row in touched})
        embeddings, labels = (torch.cat(parts) for parts in zip(*samples, strict=True))
        expectation, seen = expectation_reference(expectation, seen, embeddings, labels)
    # A center's own gradient can be tiny; Adam's division by its root amplifies the float32 error, hence 2e-6 of the whole matrix.
    assert relative_error(gather_rows(group, head.weight), adamw_reference(start, history, lr=1e-2, weight_decay=0.1)) < 2e-6
    assert torch.equal(gather_rows(group, head.expectation_seen), seen)
    assert relative_error(gather_rows(group, head.expectation), expectation) < 2e-6


def check_not_finite(group):
    head = PartialFC(D, 20, 1.0, (1.0, 0.0, 0.4), 16.0, group=group)
    embeddings, labels = global_batch(20)
    mine = my_share(group, embeddings)
    if dist.get_rank(group) == 1:
        mine[0, 0] = float("nan")
    mine.requires_grad_()
    before = head.weight.clone()
    head(mine, my_share(group, labels)).backward()
    assert mine.grad.isinf().all(), "every rank must hand inf to its engine"
    head.discard()
    assert torch.equal(head.weight, before)
    assert head.pending_gradient()[0].numel() == 0


def test_a_gradient_that_is_not_finite_on_one_rank_poisons_every_rank():
    run_ranks(2, check_not_finite)


def check_bad_label(group):
    head = PartialFC(D, 20, 1.0, group=group)
    labels = torch.tensor([3, 20]) if dist.get_rank(group) == 1 else torch.tensor([3, 4])
    with pytest.raises(ValueError, match=r"label 20 of sample 1 on rank 1 lies outside \[0, 20\)"):
        head(torch.randn(2, D), labels)


def test_a_label_outside_the_classes_is_named_on_every_rank():
    run_ranks(2, check_bad_label)


def sampled_rows(group, num_classes, draws):
    head = PartialFC(8, num_classes, 0.25, group=group, seed=5)
    picked = []
    for _ in range(draws):
        head(torch.randn(1, 8, requires_grad=True), torch.tensor([0])).backward()
        picked.append((head.pending_gradient()[0] + head.class_start).tolist())
        head.step(0.0, 0.0)
    state = {name: tensor.clone() for name, tensor in head.state().items()}
    resumed = PartialFC(8, num_classes, 0.25, group=group, seed=5)
    resumed.load_state(state)
    for which in (head, resumed):
        which(torch.randn(1, 8, requires_grad=True), torch.tensor([0])).backward()
    assert torch.equal(head.pending_gradient()[0], resumed.pending_gradient()[0]), "a resumed head must draw what the first would"
    return picked


def test_the_draw_is_uniform_changes_each_step_and_continues_after_a_resume():
    picked = run_ranks(2, sampled_rows, 400, 40)
    for rank, draws in enumerate(picked):
        assert all(len(draw) == 50 for draw in draws)
        assert draws[0] != draws[1]
        picks = torch.tensor(draws).flatten() - 200 * rank
        counts = torch.bincount(picks, minlength=200)[1 if rank == 0 else 0 :]  # class 0 is the positive
        # 40 draws at rate 1/4: mean 10, standard deviation 2.7; 6 of them would show a class that is favoured
        assert counts.float().mean() == pytest.approx(10, abs=0.2)
        assert counts.max() <= 27
        assert counts.min() >= 1


def test_centers_that_are_assigned_are_the_ones_that_the_optimizer_moves():
    head = PartialFC(8, 5, margin=(1.0, 0.0, 0.2), scale=16.0)
    head.weight = torch.eye(5, 8)
    head(torch.randn(4, 8, requires_grad=True), torch.tensor([0, 1, 2, 3])).backward()
    head.step(lr=0.1, weight_decay=0.0)
    assert 0 < float((head.weight - torch.eye(5, 8)).abs().max()) <= 0.1 + 1e-6


def test_without_gradients_the_loss_is_that_of_the_next_training_call_and_nothing_is_left_behind():
    head = PartialFC(8, 50, 0.3, (1.0, 0.0, 0.2), 16.0, seed=2)
    embeddings, labels = torch.randn(4, 8, requires_grad=True), torch.tensor([0, 7, 7, 49])
    with torch.no_grad():
        expected = head(embeddings, labels)
    assert not expected.requires_grad
    assert head.pending_gradient()[0].numel() == 0
    assert torch.equal(head(embeddings, labels).detach(), expected)
