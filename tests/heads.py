"""Heads for tests: settings, one global batch, the comparison with the float64 reference, and what a head's operations are watched for."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from model.class_shard import ClassShard, initial_centers
from model.norm_margin import AdaFace, MagFace
from model.partial_fc import CENTERS, PartialFC
from tests.reference import adaface_reference, head_reference, last_embedding_reference, magface_reference, relative_error

D, BATCH, SEED = 24, 12, 7
# Relative norm. float32 keeps 6e-8 an operation and the scale multiplies the error of a cosine; two anchors do so twice.
EXACT, EXACT_TWO_ANCHORS = 5e-6, 2e-5
MARGINS = {"sphereface": (1.35, 0.0, 0.0), "arcface": (1.0, 0.5, 0.0), "cosface": (1.0, 0.0, 0.4), "combined": (1.2, 0.3, 0.1)}
RULES = ("exact", "straight_through")
ONE_TERM = ("learned", "replace", "vpl")  # centers modes
# Norms of the test's embeddings are 8 to 16: some lie beyond either end. h is large because AdaFace's deviation starts at 100.
NORM_MARGINS = (AdaFace(0.4, 8.0), AdaFace(0.9, 30.0), MagFace(10.0, 14.0, 0.3, 1.2, 35.0))
# Arguments of PartialFC that change what a step does.
VARIANTS = {
    "plain": {},
    "curricular": {"curricular": True},
    "uniface": {"loss": "uniface"},
    "filter": {"interclass_filter": 0.1},
    "adaface": {"margin": NORM_MARGINS[0]},
    "magface": {"margin": NORM_MARGINS[2]},
}
HEADS = [(variant, centers) for variant in VARIANTS for centers in CENTERS if variant != "uniface" or centers in ONE_TERM]


def allowed(centers, product_dtype=torch.float32):
    """Relative error of the loss and of a gradient.

    bfloat16: at scale 64 and D = 512 rounding moves a logit by 7e-3 (rms), and so each negative's part of a gradient by 0.7 % of it. Where
    the targets make up most of a gradient that is less than 5e-3 of the whole. Under pco_shared they need not: where e takes over the
    targets, the class centers are left with the gradient of the negatives.
    """
    if product_dtype == torch.bfloat16:
        return 8e-3 if centers == "pco_shared" else 5e-3
    return EXACT if centers in ONE_TERM else EXACT_TWO_ANCHORS


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
    return (tensor if group is None else tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)]).clone()


def settings(margins=MARGINS, rules=RULES, rates=(1.0, 0.4), centers=CENTERS, curricular=(False, True), scale=32.0):
    """Every combination, as arguments of PartialFC."""
    names = ("margin", "margin_gradient", "sample_rate", "centers", "curricular")
    every = itertools.product([MARGINS[name] for name in margins], rules, rates, centers, curricular)
    return [dict(zip(names, values, strict=True), scale=scale) for values in every]


def expectations(num_classes):
    """(e [C, D], seen [C]): every second class has one."""
    seen = torch.arange(num_classes) % 2 == 0
    directions = torch.nn.functional.normalize(torch.randn(num_classes, D, generator=torch.Generator().manual_seed(3)))
    return directions * seen.unsqueeze(1), seen


def memories(num_classes):
    """(M [C, D], the step that wrote it [C], the coming step) of VPL: by turns never, fresh, fresh for the last time, too old by one."""
    written = torch.tensor([-201, 240, 50, 49])[torch.arange(num_classes) % 4]
    rows = torch.nn.functional.normalize(torch.randn(num_classes, D, generator=torch.Generator().manual_seed(4)))
    return rows * (written >= 0).unsqueeze(1), written, 250


def load_prototypes(head):
    """Give a head the rows of :func:`expectations` and :func:`memories` that are its own."""
    own = slice(head.class_start, head.class_start + len(head.shard))
    state = dict(head.state())
    state["expectation"], state["expectation_seen"] = (rows[own] for rows in expectations(head.num_classes))
    if head.centers == "vpl":
        memory, written, step = memories(head.num_classes)
        state |= {"last_embedding": memory[own], "last_embedding_step": written[own], "applied_steps": torch.tensor(step)}
    head.load_state({name: tensor.clone() for name, tensor in state.items()})


def call_heads(group, num_classes, every, batch):
    """One head per entry of ``every`` on its share of ``batch``; the loss arrives scaled by 8 as under a loss scale.

    Returns of each training call what this rank knows. CurricularFace gets two calls, because its t is 0 before the first.
    """
    calls = []
    for arguments in every:
        head = PartialFC(D, num_classes, seed=SEED, group=group, **arguments)
        load_prototypes(head)
        for _ in range(2 if head.curricular else 1):
            embeddings, labels = (my_share(group, part) for part in batch)
            scored = head._choose(labels).rows
            loss = head(embeddings.requires_grad_(), labels)
            (loss * 8.0).backward()
            rows, grad = head.pending_gradient()
            bias_grad = float(head._pending.mean_bias_gradient()) if head.loss == "uniface" else None
            cosines = (float(head.target_cosine.nan_to_num()), float(head.target_cosine_square.nan_to_num()))
            agreed = (float(loss.detach()), cosines, float(head.gradient_norm()), bias_grad)
            scored = torch.arange(len(head.shard)) if scored is None else scored
            centers_grad = torch.zeros_like(head.weight).index_copy_(0, rows, grad)
            calls.append((agreed, scored + head.class_start, embeddings.grad, centers_grad))
            head.step(lr=0.0, weight_decay=0.0)  # moves nothing but t
    return calls


def reference_margin(margin):
    """What head_reference takes for a head's ``margin``."""
    if isinstance(margin, AdaFace):
        return adaface_reference(**vars(margin))
    return magface_reference(**vars(margin)) if isinstance(margin, MagFace) else margin


def check(num_classes, every, batch, ranks):
    """Compare the results of ``call_heads`` on all ``ranks`` with the reference on the global batch."""
    calls = iter(list(zip(*ranks, strict=True)))
    weight = initial_centers(ClassShard(num_classes, 0, 1), D, SEED)
    expectation, seen = expectations(num_classes)
    for arguments in every:
        t, (memory, written, step) = 0.0, memories(num_classes)
        for call in range(2 if arguments.get("curricular") else 1):
            agreed, scored, embeddings_grad, centers_grad = zip(*next(calls), strict=True)
            assert len(set(agreed)) == 1, "loss, target cosines and gradient norms must be equal on every rank"
            loss, target_cosines, norm, bias_grad = agreed[0]
            scored = torch.cat(scored)
            if arguments["sample_rate"] < 1:
                assert len(scored) == max(int(arguments["sample_rate"] * num_classes), len(batch[1].unique()))
            expected = head_reference(
                *(batch[0], weight, batch[1]),
                **{name: arguments[name] for name in ("scale", "margin_gradient", "centers")},
                **{"scored": scored, "expectation": expectation, "seen": seen},
                **{"memory": memory, "share": 0.15 * (step - written <= 200)},
                margin=reference_margin(arguments["margin"]),
                t=t if arguments.get("curricular") else None,
                bias=math.log(10 * max(1.0, arguments["sample_rate"] * num_classes)) if arguments.get("loss") == "uniface" else None,
                interclass_filter=arguments.get("interclass_filter"),
            )
            exact = allowed(arguments["centers"])
            where = f"{arguments}, call {call}"
            assert relative_error(loss, expected.loss) < exact, where
            assert relative_error(torch.cat(embeddings_grad), expected.embeddings_grad * len(ranks) * 8.0) < exact, where
            assert relative_error(torch.cat(centers_grad), expected.centers_grad) < exact, where
            assert norm == pytest.approx(float(expected.centers_grad.norm()), rel=exact), where
            if bias_grad is not None:
                assert bias_grad == pytest.approx(expected.bias_grad, rel=exact), where
            if not math.isnan(expected.target_cosine):
                assert target_cosines == pytest.approx((expected.target_cosine, expected.target_cosine_square), abs=1e-6), where
                t = 0.99 * t + 0.01 * expected.target_cosine
            memory, written = last_embedding_reference(memory, written, *batch, step)
            step += 1


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return made


class HostReads(TorchDispatchMode):
    """Operations whose result or shape depends on values, so that on a GPU the host would wait for them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in {"index", "index_put", "index_put_"} else []
        masks = [index for index in indices if index is not None and index.dtype == torch.bool]
        if masks or name in {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}:
            self.found.append(name)
        return function(*args, **(kwargs or {}))
