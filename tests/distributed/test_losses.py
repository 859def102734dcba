"""What a recipe can choose beside margin and centers, sharded, against float64: AdaFace, MagFace, UniFace, inter-class filtering, VPL.

And over several steps: UniFace's bias, VPL's memory, what a head tells of itself, and steps that are not finite.
"""

import itertools
import math
import statistics

import pytest
import torch
import torch.distributed as dist

from model.partial_fc import CENTERS, PartialFC
from tests.heads import (
    MARGINS,
    NORM_MARGINS,
    ONE_TERM,
    RULES,
    D,
    call_heads,
    check,
    gather_rows,
    global_batch,
    load_prototypes,
    my_share,
)
from tests.ranks import run_ranks, run_thread_ranks
from tests.reference import adamw_reference, head_reference, last_embedding_reference, relative_error


def combinations(**choices):
    """Every combination of the given values of arguments of PartialFC, over the defaults of these tests."""
    defaults = {"margin": [MARGINS["arcface"]], "margin_gradient": ["exact"], "sample_rate": [1.0], "centers": ["learned"], "scale": [32.0]}
    choices = defaults | choices
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


EVERY = {
    "norm-margins": combinations(margin=NORM_MARGINS, margin_gradient=RULES, sample_rate=(1.0, 0.4), centers=CENTERS),
    "uniface": combinations(loss=["uniface"], margin=[*MARGINS.values(), *NORM_MARGINS], sample_rate=(1.0, 0.4), centers=ONE_TERM),
    "filter": combinations(interclass_filter=[0.05, 0.3], centers=CENTERS, sample_rate=(1.0, 0.4))
    + combinations(interclass_filter=[0.05], curricular=[True], centers=CENTERS)
    + combinations(interclass_filter=[0.05], loss=["uniface"], scale=[32.0, 64.0]),
    "large-scales": combinations(scale=[88.0, 128.0], margin=[MARGINS["cosface"], NORM_MARGINS[2]], centers=("learned", "vpl"))
    + combinations(scale=[88.0, 128.0], loss=["uniface"])
    + combinations(scale=[128.0], interclass_filter=[0.1], centers=("pco",)),
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [42, 41, 2], ids=["even", "uneven", "fewer-classes-than-ranks"])
@pytest.mark.parametrize("every", EVERY)
def test_losses_and_gradients_match_the_float64_reference(every, num_classes, world_size):
    batch = global_batch(num_classes)
    check(num_classes, EVERY[every], batch, run_ranks(world_size, call_heads, num_classes, EVERY[every], batch))


def test_64_ranks_match_the_float64_reference():
    batch = global_batch(643, batch=128)
    every = combinations(margin=NORM_MARGINS[1:], centers=("pco", "vpl"), sample_rate=(0.3,))
    every += combinations(loss=["uniface"], sample_rate=(0.3,), interclass_filter=[None, 0.2])
    check(643, every, batch, run_thread_ranks(64, call_heads, 643, every, batch))


def train_on(head, group, *batches):
    """Forward and backward of this rank's share of each micro-batch of one step; its last gradient [b, D]."""
    for embeddings, labels in batches:
        mine = my_share(group, embeddings).requires_grad_()
        head(mine, my_share(group, labels)).backward()
    return mine.grad


def check_bias(group, sample_rate):
    """AdamW does not feel a factor that all its gradients have: these steps differ in their number of micro-batches."""
    head = PartialFC(D, 40, sample_rate, MARGINS["arcface"], 16.0, group=group, loss="uniface")
    start, history, batches = head.state()["bias"].clone(), [], map(global_batch, itertools.repeat(40), itertools.count())
    for micro_batches in (1, 3, 2, 1):
        weight, bias, mean_grad = gather_rows(group, head.weight), float(head.state()["bias"]), 0.0
        for embeddings, labels in itertools.islice(batches, micro_batches):
            rows = head._choose(my_share(group, labels)).rows
            scored = None if rows is None else gather_rows(group, rows + head.class_start)
            expected = head_reference(
                *(embeddings, weight, labels), margin=MARGINS["arcface"], scale=16.0, margin_gradient="exact", bias=bias, scored=scored
            )
            mean_grad += expected.bias_grad / micro_batches
            train_on(head, group, (embeddings, labels))
        head.step(lr=0.1, weight_decay=0.5)  # b has no weight decay
        history.append({0: torch.tensor([mean_grad], dtype=torch.float64)})
        # b is about 6, where float32 is spaced by 5e-7; a step is 0.1, of which the gradient's own 5e-6 is as much again.
        expected = float(adamw_reference(start, history, lr=0.1, weight_decay=0.0))
        assert float(head.state()["bias"]) == pytest.approx(expected, abs=3e-6)
    assert len(gather_rows(group, head.state()["bias"]).unique()) == 1, "b must be the same on every rank, bit for bit"


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_bias_of_uniface_follows_adamw_on_its_mean_gradient(world_size, sample_rate):
    run_ranks(world_size, check_bias, sample_rate)


def check_memory(group, num_classes):
    head = PartialFC(D, num_classes, 0.5, MARGINS["cosface"], 16.0, group=group, centers="vpl")
    memory, written, steps = torch.zeros(num_classes, D), torch.full((num_classes,), -201), 0
    for step, applied in enumerate((True, False, True, True)):
        batches = [global_batch(num_classes, step=2 * step + micro) for micro in range(2)]
        train_on(head, group, *batches)
        if applied:
            head.step(lr=1e-2, weight_decay=0.1)
            samples, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            memory, written = last_embedding_reference(memory, written, samples, labels, steps)
            steps += 1
        else:
            head.discard()
        assert torch.equal(gather_rows(group, head.state()["last_embedding_step"]), written)
        assert relative_error(gather_rows(group, head.state()["last_embedding"]), memory) < 1e-6  # means of some float32 rows


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_vpl_remembers_the_mean_of_each_class_of_an_applied_step_and_which_step_that_was(world_size):
    run_ranks(world_size, check_memory, 41)


NOTHING = dict.fromkeys(
    ("center_expectation_cosine", "expectation_drift", "expectation_cosine", "curricular_t", "uniface_bias", "norm_mean", "norm_std"),
    math.nan,
)


def told(group, head, exact=1e-6, **expected):
    """Whether statistics() is ``expected``, and beside it and the centers' norm NaN, on every rank; cosines of float32 rows keep 1e-7."""
    mine = head.statistics()
    expected["center_norm"] = float(gather_rows(group, head.weight).double().norm(dim=1).mean())
    every = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    assert all(other == pytest.approx(mine, rel=0.0, abs=0.0, nan_ok=True) for other in every)
    assert mine == pytest.approx(NOTHING | expected, rel=exact, abs=exact, nan_ok=True)


def cosines(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double())


def check_statistics_of_expectations(group, num_classes):
    head = PartialFC(D, num_classes, 1.0, MARGINS["arcface"], 16.0, group=group, centers="pco", curricular=True)
    told(group, head, expectation_classes=0, curricular_t=0.0)
    load_prototypes(head)
    head.set_stage(1.0, "pco", update_expectation=True)
    t, drift = 0.0, math.nan
    for step, applied in enumerate((True, True, False)):
        batches = [global_batch(num_classes, step=2 * step + micro) for micro in range(2)]
        weight, old, seen = (gather_rows(group, rows) for rows in (head.weight, head.expectation, head.expectation_seen))
        train_on(head, group, *batches)
        if applied:
            head.step(lr=1e-2, weight_decay=0.1)
            for embeddings, labels in batches:
                t = 0.99 * t + 0.01 * float(cosines(embeddings, weight[labels]).mean())
            met = torch.cat([labels for _, labels in batches]).unique()
            moved = met[seen[met]]
            assert 0 < len(moved) < len(met) < 24, "the step must move some classes, meet new ones, and have duplicates"
            drift = float((1.0 - cosines(old[moved], gather_rows(group, head.expectation)[moved])).mean())
        else:
            head.discard()
        weight, new, seen_now = (gather_rows(group, rows) for rows in (head.weight, head.expectation, head.expectation_seen))
        expected = {"expectation_classes": int(seen_now.sum()), "expectation_drift": drift, "curricular_t": t}
        expected["center_expectation_cosine"] = float(cosines(weight, new)[seen_now].mean())
        embeddings, labels = batches[-1]
        expected["expectation_cosine"] = float(cosines(embeddings, old[labels])[seen[labels]].mean())  # before the step moved e
        told(group, head, **expected)


def check_statistics_without_a_meaning(group, num_classes):
    """One class, met by one step after the other."""
    head = PartialFC(D, num_classes, 1.0, MARGINS["arcface"], 16.0, group=group, centers="pco")
    labels = torch.full((12,), num_classes - 1)

    def step(number, centers, update_expectation):
        head.set_stage(1.0, centers, update_expectation)
        train_on(head, group, (global_batch(num_classes, step=number)[0], labels))
        head.step(lr=0.0, weight_decay=0.0)
        told = head.statistics()
        assert told["expectation_classes"] == 1
        return math.isnan(told["expectation_drift"]), math.isnan(told["expectation_cosine"])

    assert step(0, "pco", True) == (True, True), "a class that is new has not moved, and its samples had nothing to compare with"
    assert step(1, "pco", True) == (False, False)
    assert step(2, "learned", True) == (False, True), "the last micro-batch was scored against no e"
    assert step(3, "pco", False) == (True, False), "the last step moved no e"
    assert step(4, "pco", True) == (False, False)
    head.step(lr=0.0, weight_decay=0.0)
    assert math.isnan(head.statistics()["expectation_drift"]), "a step without samples moved no e"


def check_statistics_of_losses(group, num_classes):
    uniface = PartialFC(D, num_classes, 0.5, group=group, loss="uniface")
    told(group, uniface, expectation_classes=0, uniface_bias=math.log(10 * 0.5 * num_classes))
    train_on(uniface, group, global_batch(num_classes))
    uniface.step(lr=0.1, weight_decay=0.0)
    told(group, uniface, expectation_classes=0, uniface_bias=float(uniface.state()["bias"]))
    magface = PartialFC(D, num_classes, group=group, margin=NORM_MARGINS[2])
    told(group, magface, expectation_classes=0)
    adaface = PartialFC(D, num_classes, group=group, margin=NORM_MARGINS[0])
    mean, std = 20.0, 100.0
    told(group, adaface, expectation_classes=0, norm_mean=mean, norm_std=std)
    batches = [global_batch(num_classes, step=micro) for micro in range(2)]
    train_on(adaface, group, *batches)
    adaface.discard()
    told(group, adaface, expectation_classes=0, norm_mean=mean, norm_std=std)
    train_on(adaface, group, *batches)
    adaface.step(lr=0.0, weight_decay=0.0)
    for embeddings, _ in batches:
        norms = embeddings.double().norm(dim=1).tolist()
        mean, std = 0.99 * mean + 0.01 * statistics.mean(norms), 0.99 * std + 0.01 * statistics.stdev(norms)
    told(group, adaface, expectation_classes=0, norm_mean=mean, norm_std=std)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "check_statistics", [check_statistics_of_expectations, check_statistics_without_a_meaning, check_statistics_of_losses]
)
def test_statistics_are_those_of_the_rows_of_all_ranks_and_nan_where_there_is_nothing(check_statistics, world_size):
    run_ranks(world_size, check_statistics, 41)


SKIPPED = combinations(margin=[MARGINS["arcface"], *NORM_MARGINS], interclass_filter=[None, 0.3], centers=CENTERS)
SKIPPED += combinations(margin=[MARGINS["arcface"], *NORM_MARGINS], loss=["uniface"], centers=ONE_TERM)
SKIPPED += combinations(curricular=[True], centers=CENTERS)


def check_not_finite(group, value):
    for arguments in SKIPPED:
        head = PartialFC(D, 20, group=group, **arguments)
        load_prototypes(head)
        head.set_stage(head.sample_rate, head.centers, update_expectation=True)
        before = {name: tensor.clone() for name, tensor in head.state().items()}
        assert train_on(head, group, global_batch(20)).isfinite().all(), arguments
        embeddings, labels = global_batch(20, step=1)
        embeddings[-1, 0] = value  # a sample of the last rank
        assert train_on(head, group, (embeddings, labels)).isinf().all(), f"{arguments}: every rank must hand inf to its engine"
        assert head.not_finite_ranks() == [dist.get_world_size(group) - 1], arguments
        head.discard()
        before["draws"] += 2  # which classes come next is no matter of a step's fate
        assert [name for name, tensor in head.state().items() if not torch.equal(tensor, before[name])] == [], arguments
        assert head.pending_gradient()[0].numel() == 0, arguments


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_a_sample_that_is_not_finite_poisons_every_rank_under_every_loss_and_leaves_nothing(value):
    run_ranks(2, check_not_finite, value)


def check_blame(group):
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    guilty = [ranks for count in range(1, world_size + 1) for ranks in itertools.combinations(range(world_size), count)]
    for what, ranks in itertools.product(("embedding", "center", "expectation", "nothing"), guilty):
        head = PartialFC(D, 20, 1.0, MARGINS["cosface"], 16.0, group=group, centers="pco")
        load_prototypes(head)
        assert head.not_finite_ranks() == []
        first, second = global_batch(20), global_batch(20, step=1)
        if what == "embedding":
            first[0].view(world_size, -1)[list(ranks)] = math.nan
        elif rank in ranks and what != "nothing":
            {"center": head.weight, "expectation": head.expectation}[what][:] = math.nan
        train_on(head, group, first, second)
        # An expectation is a part of every sample's loss: who owns it cannot be told from the gradients.
        blamed = {"nothing": [], "expectation": list(range(world_size))}.get(what, list(ranks))
        assert head.not_finite_ranks() == blamed, (what, ranks)
        head.discard()
        assert head.not_finite_ranks() == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_whose_embeddings_or_class_centers_are_not_finite_are_named_on_every_rank(world_size):
    run_ranks(world_size, check_blame)
