"""What a recipe can choose beside margin and centers, sharded, against float64: AdaFace, MagFace, UniFace, inter-class filtering, VPL."""

import itertools

import pytest

from model.norm_margin import AdaFace, MagFace
from model.partial_fc import CENTERS
from tests.heads import MARGINS, RULES, call_heads, check, global_batch
from tests.ranks import run_ranks, run_thread_ranks

# Norms of the test's embeddings are 8 to 16: some lie beyond either end. h is large because AdaFace's deviation starts at 100.
NORM_MARGINS = (AdaFace(0.4, 8.0), AdaFace(0.9, 30.0), MagFace(10.0, 14.0, 0.3, 1.2, 35.0))
ONE_TERM = ("learned", "replace", "vpl")


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
