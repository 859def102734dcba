"""What the head tells of itself, against a brute-force count over all samples and classes."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.norm_margin import AdaFace
from model.observation import COSINE_EDGES
from model.partial_fc import PartialFC
from tests.heads import BATCH, SEED, D, expectations, gather_rows, global_batch, my_share
from tests.ranks import run_ranks

CHUNK = 5  # samples: the first chunk is a part of the batch
OPTIONS = {
    "plain": {},
    "scale 88, shifted logits": {"scale": 88.0},
    "filter": {"interclass_filter": 0.1},
    "sampled": {"sample_rate": 0.4},
    "pco": {"centers": "pco"},
    "replace": {"centers": "replace"},
    "adaface": {"margin": AdaFace(0.4, 8.0)},
    "bfloat16": {"product_dtype": torch.bfloat16},
    "curricular": {"curricular": True},
    "uniface": {"loss": "uniface"},
}


def observe(group, num_classes, options):
    """Two micro-batches, the second observed; every count compared on every rank."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    head = PartialFC(D, num_classes, **{"margin": (1.0, 0.3, 0.1), "scale": 32.0, **options}, group=group, seed=SEED, chunk_rows=CHUNK)
    rows = slice(head.class_start, head.class_start + len(head.shard))
    e, seen = expectations(num_classes)
    head.expectation.copy_(e[rows])
    head.expectation_seen.copy_(seen[rows])
    assert math.isnan(head.observation.hardest_negative)
    cosines, held = [], []
    for step in (0, 1):
        embeddings, labels = global_batch(num_classes, step)
        weight = F.normalize(gather_rows(group, head.weight).double())
        anchor = e.double() if head.centers == "replace" else weight
        cosine = F.normalize(embeddings.double()) @ anchor.T  # [B, C]
        own_held = seen[labels] if head.centers == "replace" else torch.ones(BATCH, dtype=torch.bool)
        cosines.append(cosine[torch.arange(BATCH), labels].chunk(world_size)[rank])
        held.append(own_held.chunk(world_size)[rank])
        head.observing = step == 1
        mine = my_share(group, labels)
        head.prepare(mine)
        scored = torch.arange(len(head.shard)) if head._prepared.choice.rows is None else head._prepared.choice.rows
        loss = head(my_share(group, embeddings).requires_grad_(), mine)
        loss.backward()
    all_scored = gather_rows(group, scored + head.class_start)

    negative = torch.zeros(BATCH, num_classes, dtype=torch.bool)
    negative[:, all_scored] = True
    negative[torch.arange(BATCH), labels] = False
    if head.centers == "replace":
        negative &= seen
    if head.interclass_filter is not None:
        negative &= cosine <= head.interclass_filter
    hardest = cosine.masked_fill(~negative, -math.inf).amax(1)[:CHUNK].mean()
    shown = head.observation.hardest_negative
    if head.curricular or head.loss == "uniface":
        assert math.isnan(shown)
    else:
        assert shown == pytest.approx(float(hardest), abs=4e-3 if "product_dtype" in options else 1e-6)

    assert head.observation.sampled == len(scored)
    own_rows = labels[(labels >= rows.start) & (labels < rows.stop)]
    assert int(head.observation.positive) == len(own_rows.unique())
    values = torch.cat(cosines)[torch.cat(held)].numpy()
    assert head.observation.take_cosines() == np.histogram(values, [-np.inf, *COSINE_EDGES, np.inf])[0].tolist()
    assert head.observation.take_cosines() == [0] * (len(COSINE_EDGES) + 1)


@pytest.mark.parametrize(("world_size", "num_classes"), [(1, 41), (2, 41), (3, 41), (3, 2)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cosines_classes_and_hardest_negatives_are_those_of_a_brute_force_count(options, world_size, num_classes):
    run_ranks(world_size, observe, num_classes, options)


def same_with_and_without(group):
    """Observing changes neither loss nor gradients, bit for bit."""
    results = []
    for observing in (False, True):
        head = PartialFC(D, 41, group=group, seed=SEED, chunk_rows=CHUNK)
        head.observing = observing
        embeddings, labels = global_batch(41)
        mine = my_share(group, embeddings).requires_grad_()
        loss = head(mine, my_share(group, labels))
        loss.backward()
        results.append((loss.detach(), mine.grad, head.pending_gradient()[1]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_observing_changes_no_bit_of_a_step():
    run_ranks(2, same_with_and_without)


def test_every_class_that_an_update_moves_or_gives_a_first_value_is_counted():
    head = PartialFC(D, 41, margin=(1.0, 0.3, 0.0), scale=32.0)
    head.set_stage(1.0, "learned", update_expectation=True)
    expected = 0
    for step in range(3):
        embeddings, labels = global_batch(41, step)
        head(embeddings.requires_grad_(), labels).backward()
        head.step(lr=1e-3, weight_decay=0.1)
        expected += len(labels.unique())
    assert head.expectation_updates == expected


def test_center_norm_is_the_mean_over_all_ranks():
    run_ranks(3, check_center_norm)


def check_center_norm(group):
    head = PartialFC(D, 41, group=group, seed=SEED)
    expected = gather_rows(group, head.weight).double().norm(dim=1).mean()
    assert head.statistics()["center_norm"] == pytest.approx(float(expected), rel=1e-6)
