"""The sharded head against float64 on 1, 2, 3 and 64 ranks: loss, both gradients, expectation, row-sparse AdamW, the sampled classes."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist

from model.class_shard import ClassShard
from model.partial_fc import CENTERS, PartialFC
from tests.heads import (
    EXACT,
    HEADS,
    MARGINS,
    RULES,
    VARIANTS,
    Allocations,
    D,
    HostReads,
    call_heads,
    check,
    gather_rows,
    global_batch,
    my_share,
    settings,
)
from tests.ranks import run_ranks, run_thread_ranks
from tests.reference import adamw_reference, expectation_reference, head_reference, relative_error


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [42, 41, 2], ids=["even", "uneven", "fewer-classes-than-ranks"])
def test_sharded_loss_and_gradients_match_the_float64_reference(world_size, num_classes):
    every, batch = settings(), global_batch(num_classes)
    check(num_classes, every, batch, run_ranks(world_size, call_heads, num_classes, every, batch))


@pytest.mark.parametrize("scale", [64.0, 88.0, 128.0])
@pytest.mark.parametrize("num_classes", [41, 2])
def test_large_scales_neither_overflow_nor_lose_precision(scale, num_classes):
    """From 88 - ln C on logits are shifted by their maximum. With two classes a sample's only negative may have any cosine."""
    every, batch = settings(margins=("arcface", "cosface"), rates=(1.0,), scale=scale), global_batch(num_classes)
    check(num_classes, every, batch, run_ranks(2, call_heads, num_classes, every, batch))


def crowded_batch(num_classes, batch):
    """Every positive on rank 5 of 64, with duplicates."""
    shard = ClassShard(num_classes, 5, 64)
    return global_batch(num_classes, batch=batch)[0], shard.start + torch.arange(batch) % len(shard)


@pytest.mark.parametrize(("num_classes", "positives"), [(64 * 10 + 3, "on-one-rank"), (50, "everywhere-and-empty-shards")])
def test_64_ranks_match_the_float64_reference(num_classes, positives):
    batch = crowded_batch(num_classes, 128) if positives == "on-one-rank" else global_batch(num_classes, batch=128)
    plain, hard = (False,), (True,)
    every = settings(("arcface",), ("exact",), (0.3,), CENTERS, plain) + settings(("combined",), RULES, (1.0,), ("pco",), plain)
    every += settings(("cosface",), ("exact",), (0.3,), ("learned", "pco"), hard, scale=64.0)
    every += settings(("sphereface",), ("straight_through",), (0.3,), ("learned", "pco"), plain, scale=128.0)
    check(num_classes, every, batch, run_thread_ranks(64, call_heads, num_classes, every, batch))


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
            mine = my_share(group, labels)
            rows = head._choose(mine).rows
            head(my_share(group, embeddings).requires_grad_(), mine).backward()
            scored = gather_rows(group, rows + head.class_start)
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


def check_bad_label(group):
    head = PartialFC(D, 20, 1.0, group=group)
    labels = torch.tensor([3, 20]) if dist.get_rank(group) == 1 else torch.tensor([3, 4])
    with pytest.raises(ValueError, match=r"label 20 of sample 1 on rank 1 lies outside \[0, 20\)"):
        head(torch.randn(2, D), labels)


def test_a_label_outside_the_classes_is_named_on_every_rank():
    run_ranks(2, check_bad_label)


def sampled_classes(group, num_classes, draws):
    """Of each draw, and of one more by a head that resumed after them."""
    head = PartialFC(8, num_classes, 0.25, group=group, seed=5)
    embeddings, labels = torch.ones(12 // dist.get_world_size(group), 8), my_share(group, torch.arange(12) % 4 * 7)

    def draw(which):
        which(embeddings.clone().requires_grad_(), labels).backward()
        rows = which.pending_gradient()[0]
        which.step(0.0, 0.0)
        return (rows + which.class_start).tolist()

    picked = [draw(head) for _ in range(draws)]
    state = {name: tensor.clone() for name, tensor in head.state().items()}
    resumed = PartialFC(8, num_classes, 0.25, group=group, seed=5)
    resumed.load_state(state)
    picked.append(draw(head))
    assert draw(resumed) == picked[-1], "a resumed head must draw what the first would"
    return picked


def test_the_sampled_classes_are_the_same_at_any_world_size_and_uniform():
    by_world_size = [
        [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
        for ranks in (run_ranks(world_size, sampled_classes, 401, 40) for world_size in (1, 2, 3))
    ]
    assert by_world_size[0] == by_world_size[1] == by_world_size[2]
    draws = by_world_size[0]
    assert all(len(draw) == len(set(draw)) == 100 for draw in draws)
    assert all({0, 7, 14, 21} <= set(draw) for draw in draws)
    assert draws[0] != draws[1]
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=401)
    negatives = torch.cat([counts[:22][torch.arange(22) % 7 != 0], counts[22:]]).double()
    # 41 draws of 96 among 397: mean 9.9, standard deviation 2.7; 6 of them would show a class that is favoured
    assert negatives.mean() == pytest.approx(41 * 96 / 397)
    assert negatives.std() == pytest.approx(2.7, abs=0.4)
    assert negatives.max() <= 26


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


def trained(num_classes, batch, size=512, noise=0.015):
    """(weight, embeddings, labels) as late in training: samples lie ``noise`` a component from their centers."""
    generator = torch.Generator().manual_seed(0)
    weight, labels = torch.randn(num_classes, size, generator=generator), torch.randint(0, num_classes, (batch,), generator=generator)
    return weight, torch.nn.functional.normalize(weight)[labels] + noise * torch.randn(batch, size, generator=generator), labels


def against_reference(head, embeddings, labels, **reference):
    """Relative errors (loss, gradient of the embeddings, gradient of the centers) of one process's head."""
    embeddings = embeddings.clone().requires_grad_()
    loss = head(embeddings, labels)
    loss.backward()
    arguments = {"margin": head.margin, "scale": head.scale, "margin_gradient": head.margin_gradient, "centers": head.centers}
    expected = head_reference(embeddings.detach(), head.weight, labels, **(arguments | reference))
    pairs = ((loss.detach(), expected.loss), (embeddings.grad, expected.embeddings_grad))
    return [relative_error(*pair) for pair in (*pairs, (head.pending_gradient()[1], expected.centers_grad))]


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("scale", [64.0, 80.0])
def test_samples_near_their_centers_are_as_exact_although_the_slope_of_a_margin_is_steep_there(scale, margin):
    """1,500 classes are more than one block of a normalisation's backward; scale 80 is where sums times slopes come near float32's end."""
    weight, embeddings, labels = trained(1500, 64)
    head = PartialFC(512, 1500, 1.0, MARGINS[margin], scale)
    head.weight = weight
    assert all(error < EXACT for error in against_reference(head, embeddings, labels))


@pytest.mark.parametrize("scale", [79.0, 84.0, 87.2])
def test_a_sample_upon_its_center_has_finite_gradients_at_any_scale(scale):
    head = PartialFC(D, 2, 1.0, MARGINS["arcface"], scale, curricular=True)
    embeddings = torch.stack([head.weight[0], head.weight[0], -head.weight[1]]).requires_grad_()
    head(embeddings, torch.tensor([0, 1, 1])).backward()
    assert embeddings.grad.isfinite().all()
    assert head.pending_gradient()[1].isfinite().all()


@pytest.mark.parametrize("centers", CENTERS)
@pytest.mark.parametrize("scale", [16.0, 128.0])
def test_a_single_class_has_no_negatives_and_loses_nothing(centers, scale):
    head = PartialFC(8, 1, 1.0, scale=scale, centers=centers)
    head.expectation[0, 0], head.expectation_seen[0] = 1.0, True
    embeddings = torch.randn(3, 8, requires_grad=True)
    loss = head(embeddings, torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss == 0.0
    assert (embeddings.grad == 0.0).all()
    assert (head.pending_gradient()[1] == 0.0).all()


def test_rows_of_zeros_have_finite_gradients_and_no_expectation():
    head = PartialFC(8, 4, margin=(1.0, 0.0, 0.4))
    head.set_stage(1.0, "learned", update_expectation=True)
    head.weight[1] = 0.0
    embeddings = torch.randn(3, 8)
    embeddings[0] = 0.0
    embeddings.requires_grad_()
    head(embeddings, torch.tensor([0, 1, 2])).backward()
    assert embeddings.grad.isfinite().all()
    head.step(0.0, 0.0)
    assert head.expectation_seen.tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_16_bits_and_autocast_change_nothing_but_their_own_rounding(dtype):
    embeddings, labels = global_batch(40)
    embeddings = embeddings.to(dtype)
    head = PartialFC(D, 40, margin=MARGINS["cosface"])
    expected = head_reference(embeddings, head.weight, labels, margin=MARGINS["cosface"], scale=64.0, margin_gradient="exact")
    embeddings.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = head(embeddings, labels)
    loss.backward()
    assert relative_error(loss.detach(), expected.loss) < EXACT
    assert relative_error(head.pending_gradient()[1], expected.centers_grad) < EXACT
    assert embeddings.grad.dtype == dtype
    assert relative_error(embeddings.grad, expected.embeddings_grad) < torch.finfo(dtype).eps


@pytest.mark.parametrize("sample_rate", [0.3, 1.0])
def test_preparing_a_batch_changes_no_number(sample_rate):
    embeddings, labels = torch.randn(6, 8), torch.tensor([0, 7, 7, 49, 3, 12])
    results = []
    for prepare in (True, False):
        head = PartialFC(8, 50, sample_rate, (1.0, 0.0, 0.2), 16.0, seed=2)
        if prepare:
            head.prepare(labels)
            head.prepare(labels)
        loss = head(x := embeddings.clone().requires_grad_(), labels)
        loss.backward()
        results.append((loss.detach(), x.grad, *head.pending_gradient()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_labels_other_than_the_prepared_ones_are_chosen_for_anew():
    head, labels = PartialFC(8, 50, 0.3, (1.0, 0.0, 0.2), 16.0), torch.tensor([0, 7])
    head.prepare(labels)
    head(torch.randn(2, 8, requires_grad=True), torch.tensor([30, 31])).backward()
    assert {30, 31} <= set(head.pending_gradient()[0].tolist())


@pytest.mark.parametrize("centers", CENTERS)
@pytest.mark.parametrize("chunk_rows", [1, 5, 64])
def test_chunks_of_any_size_give_the_same_result(centers, chunk_rows):
    batch, every = global_batch(41), settings(("arcface",), ("exact",), (1.0,), (centers,))
    ranks = [call_heads(None, 41, [dict(one, chunk_rows=chunk_rows) for one in every], batch)]
    check(41, every, batch, ranks)


@pytest.mark.parametrize("centers", ["learned", "pco"])
def test_bfloat16_operands_cost_less_than_half_a_percent_of_the_gradient(centers):
    """At the head's real embedding size and scale; the loss and the target's cosine come from float32."""
    num_classes, size, generator = 600, 512, torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_classes, (64,), generator=generator)
    head = PartialFC(size, num_classes, 1.0, (1.0, 0.0, 0.4), 64.0, product_dtype=torch.bfloat16)
    # samples and expectations near their centers, as they are in training
    directions = torch.nn.functional.normalize(head.weight)
    head.expectation.copy_(torch.nn.functional.normalize(directions + 0.04 * torch.randn(num_classes, size, generator=generator)))
    head.expectation_seen.fill_(True)
    head.set_stage(1.0, centers, False)
    embeddings = directions[labels] + 0.06 * torch.randn(64, size, generator=generator)
    loss, *gradients = against_reference(head, embeddings, labels, expectation=head.expectation, seen=head.expectation_seen)
    assert loss < 1e-3
    assert all(1e-4 < error < 5e-3 for error in gradients)


@pytest.mark.parametrize("scale", [32.0, 128.0])
@pytest.mark.parametrize(("variant", "centers"), HEADS)
def test_no_operation_makes_a_matrix_of_batch_by_classes(variant, centers, scale):
    """Forward, backward, AdamW and the expectation's update; the largest tensors are those of [C, D], [B, D] and one chunk."""
    batch, num_classes, size, chunk_rows = 256, 4000, 16, 32
    head = PartialFC(size, num_classes, 1.0, scale=scale, chunk_rows=chunk_rows, **VARIANTS[variant])
    head.set_stage(1.0, centers, update_expectation=True)
    head.expectation_seen[:3000] = True
    labels, embeddings = torch.arange(batch) * 7, torch.randn(batch, size, requires_grad=True)
    with Allocations() as allocations:
        head(embeddings, labels).backward()
        head.step(1e-3, 0.1)
        with torch.no_grad():
            head(embeddings, labels)
    chunk = chunk_rows * (3000 if centers == "replace" else num_classes) * 4
    assert chunk <= allocations.largest < 2 * chunk < batch * num_classes * 4


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize(("variant", "centers"), HEADS)
def test_only_prepare_looks_at_values(variant, centers, sample_rate):
    head = PartialFC(8, 50, scale=64.0, **VARIANTS[variant])
    labels = torch.tensor([0, 7, 7, 49])
    head.expectation_seen[:30] = True
    head.set_stage(sample_rate, centers, update_expectation=True)
    for _ in range(2):  # micro-batches of one step
        with HostReads() as reads:
            head.prepare(labels)
        assert reads.found, "the test must see what prepare reads"
        with HostReads() as reads:
            head(torch.randn(4, 8, requires_grad=True), labels).backward()
        assert reads.found == []
    with HostReads() as reads:
        head.gradient_norm()
        head.step(1e-3, 0.1)
    assert reads.found == []


def test_evaluation_between_calls_and_a_skipped_step_do_not_move_t():
    head = PartialFC(8, 10, 1.0, scale=32.0, curricular=True)
    embeddings, labels = torch.randn(4, 8), torch.arange(4)

    def t():
        return float(head.state()["curricular_t"])

    with torch.no_grad():
        head(embeddings, labels)
    head.step(0.0, 0.0)
    assert t() == 0.0
    head(embeddings.requires_grad_(), labels).backward()
    head.discard()
    assert t() == 0.0
    for _ in range(2):  # two micro-batches of one step
        head(embeddings, labels).backward()
    head.step(0.0, 0.0)
    mean = float(head.target_cosine)
    assert t() == pytest.approx(0.01 * mean * 1.99, rel=1e-5)
    resumed = PartialFC(8, 10, 1.0, scale=32.0, curricular=True)
    resumed.load_state(head.state())
    assert float(resumed.state()["curricular_t"]) == t()


def test_what_was_prepared_or_pending_does_not_outlive_a_change():
    head, labels = PartialFC(8, 50, 0.3, (1.0, 0.0, 0.2), 16.0), torch.tensor([0, 7])
    embeddings = torch.randn(2, 8, requires_grad=True)

    def scored():
        head(embeddings, labels).backward()
        rows = head.pending_gradient()[0]
        head.discard()
        return rows.numel()

    head.prepare(labels)
    head.set_stage(0.5, "learned", update_expectation=False)
    assert scored() == 25
    head.prepare(labels)
    labels.copy_(torch.tensor([30, 31]))
    head(embeddings, labels).backward()
    assert {30, 31} <= set(head.pending_gradient()[0].tolist())
    head.load_state({name: tensor.clone() for name, tensor in head.state().items()})
    assert head.pending_gradient()[0].numel() == 0
    head.set_stage(1.0, "replace", update_expectation=True)
    head(embeddings, labels).backward()
    head.prepare(labels)
    head.step(0.0, 0.0)  # gives classes 30 and 31 their expectations, against which the same samples then have a loss
    assert head(embeddings, labels) > 0.0


def test_expectations_stay_where_the_stage_does_not_move_them():
    head = PartialFC(8, 5, margin=(1.0, 0.0, 0.2))
    head.set_stage(1.0, "learned", update_expectation=True)
    head(torch.randn(2, 8, requires_grad=True), torch.tensor([0, 1])).backward()
    head.set_stage(1.0, "learned", update_expectation=False)
    head.step(0.1, 0.0)
    assert not head.expectation_seen.any()


def test_a_pending_gradient_that_was_handed_out_does_not_change():
    head, labels = PartialFC(8, 5, margin=(1.0, 0.0, 0.2)), torch.tensor([0, 1])
    head(torch.randn(2, 8, requires_grad=True), labels).backward()
    before = head.pending_gradient()[1]
    copy = before.clone()
    head(torch.randn(2, 8, requires_grad=True), labels).backward()
    assert torch.equal(before, copy)


def test_a_second_backward_is_refused_and_counts_for_nothing():
    head, labels = PartialFC(8, 5, margin=(1.0, 0.0, 0.2)), torch.tensor([0, 1])
    loss = head(torch.randn(2, 8, requires_grad=True), labels)
    loss.backward(retain_graph=True)
    before = head.pending_gradient()[1]
    with pytest.raises(RuntimeError, match="has been through backward already"):
        loss.backward()
    assert torch.equal(head.pending_gradient()[1], before)


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.zeros(4, 8), torch.tensor([1]), r"must be \[b, 8\] and \[b\], b > 0, got \(4, 8\) and \(1,\)"),
        (torch.zeros(1, 7), torch.tensor([1]), r"got \(1, 7\)"),
        (torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), r"b > 0"),
        (torch.zeros(1, 8), torch.tensor([1.0]), "must be integers, got torch.float32"),
    ],
)
def test_batches_that_do_not_fit_are_refused(embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        PartialFC(8, 5)(embeddings, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": math.inf}, "scale must be positive"),
        ({"sample_rate": 1.5}, "sample_rate must lie in"),
        ({"centers": "both"}, "centers must be one of learned, pco"),
        ({"margin_gradient": "none"}, "margin_gradient must be one of"),
        ({"margin": (math.inf, 0.0, 0.0)}, "margin must satisfy"),
        ({"betas": (1.0, 0.9)}, "betas must lie in"),
        ({"chunk_rows": 0}, "chunk_rows must be positive"),
        ({"num_classes": 0}, "num_classes must be positive"),
        ({"product_dtype": torch.float16}, "product_dtype must be torch.float32 or torch.bfloat16"),
        ({"optimizer": "sgd"}, "optimizer must be row_sparse or dense"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PartialFC(**({"embedding_size": 8, "num_classes": 5} | arguments))


def test_centers_and_states_that_do_not_fit_change_nothing():
    head = PartialFC(8, 5)
    before = head.weight.clone()
    with pytest.raises(ValueError, match=r"of shape \(8,\) do not fit this rank's \(5, 8\)"):
        head.weight = torch.ones(8)
    state = {name: tensor.clone() for name, tensor in PartialFC(8, 5, seed=1).state().items()}
    del state["curricular_t"]
    with pytest.raises(ValueError, match="lacks curricular_t"):
        head.load_state(state)
    assert torch.equal(head.weight, before)
    head.weight = torch.nn.Parameter(torch.ones(5, 8))
    assert not head.weight.requires_grad
