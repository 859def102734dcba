"""What a head keeps over steps and checkpoints, on one process."""

import pytest
import torch

from model.partial_fc import PartialFC
from tests.heads import HEADS, VARIANTS, D, global_batch, load_prototypes
from tests.reference import class_means_reference, head_reference

NUM_CLASSES = 41


def build(variant="plain", centers="learned", **arguments):
    head = PartialFC(D, NUM_CLASSES, 0.5, scale=32.0, centers=centers, **VARIANTS[variant], **arguments)
    head.set_stage(0.5, centers, update_expectation=True)
    return head


def train(head, first_step, steps):
    """Steps of two micro-batches; their losses."""
    losses = []
    for step in range(first_step, first_step + steps):
        for micro in range(2):
            embeddings, labels = global_batch(NUM_CLASSES, step=2 * step + micro)
            losses.append(head(embeddings.requires_grad_(), labels))
            losses[-1].backward()
        head.step(lr=1e-2, weight_decay=0.1)
    return [float(loss.detach()) for loss in losses]


def copied(head):
    return {name: tensor.clone() for name, tensor in head.state().items()}


def differing(head, state):
    """Names in which the state of ``head`` is not ``state``, bit for bit."""
    mine = head.state()
    return sorted(mine.keys() ^ state.keys()) + [name for name in mine.keys() & state.keys() if not torch.equal(mine[name], state[name])]


@pytest.mark.parametrize("optimizer", ["row_sparse", "dense"])
@pytest.mark.parametrize(("variant", "centers"), HEADS)
def test_a_head_that_resumes_goes_on_bit_for_bit(variant, centers, optimizer):
    head = build(variant, centers, optimizer=optimizer)
    load_prototypes(head)
    train(head, 0, 3)
    resumed = build(variant, centers, optimizer=optimizer)
    resumed.load_state(copied(head))
    assert differing(resumed, head.state()) == []
    assert train(resumed, 3, 2) == train(head, 3, 2)
    assert differing(resumed, head.state()) == []


def spoiled(state):
    """(name, ``state`` without it or with another size of it), for all names."""
    for name, tensor in state.items():
        yield name, {other: state[other] for other in state if other != name}
        yield name, state | {name: torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor.repeat(2)}


@pytest.mark.parametrize("centers", ["vpl", "learned"])
@pytest.mark.parametrize("optimizer", ["row_sparse", "dense"])
def test_a_state_that_lacks_anything_or_is_of_another_size_is_refused_and_changes_nothing(optimizer, centers):
    """Also a state with half a memory, for a stage that would not score it."""
    other = build("uniface", "vpl", optimizer=optimizer)
    train(other, 0, 2)
    head = build("uniface", centers, optimizer=optimizer, seed=1)
    embeddings, labels = global_batch(NUM_CLASSES)
    head(embeddings.requires_grad_(), labels).backward()
    before, pending = copied(head), head.pending_gradient()
    for name, state in spoiled(copied(other)):
        with pytest.raises(ValueError, match=rf"the state of a head (lacks|is of other sizes:).*\b{name}\b"):
            head.load_state(state)
        assert differing(head, before) == [], name
        assert all(torch.equal(a, b) for a, b in zip(head.pending_gradient(), pending, strict=True)), name


def test_vpl_draws_a_class_center_for_200_steps_after_the_one_that_met_its_class():
    head = PartialFC(D, 5, 1.0, (1.0, 0.0, 0.2), 16.0, centers="vpl")
    samples, labels = torch.randn(6, D, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 1])
    embeddings, probes = samples[:2], (samples[2:], torch.tensor([1, 1, 2, 3]))
    memory, met = torch.zeros(5, D, dtype=torch.float64), torch.zeros(5)
    memory[1], met[1] = class_means_reference(embeddings, labels)[1], 1.0
    arguments = {"margin": (1.0, 0.0, 0.2), "scale": 16.0, "margin_gradient": "exact", "centers": "vpl", "memory": memory}
    alone, drawn = (head_reference(probes[0], head.weight, probes[1], **arguments, share=0.15 * met * on).loss for on in (0, 1))
    assert abs(alone - drawn) > 1e-2, "the test must see the difference"

    def loss():
        with torch.no_grad():
            return float(head(*probes))

    for _ in range(3):
        head.step(lr=0.0, weight_decay=0.0)
    assert loss() == pytest.approx(alone, rel=1e-5)
    head(embeddings.requires_grad_(), labels).backward()
    assert loss() == pytest.approx(alone, rel=1e-5)
    head.step(lr=0.0, weight_decay=0.0)
    for expected in [drawn] * 200 + [alone] * 3:
        assert loss() == pytest.approx(expected, rel=1e-5)
        head.step(lr=0.0, weight_decay=0.0)


def test_a_state_of_before_a_stage_of_vpl_begins_its_memory_anew():
    """What a run goes back to, if it is in that stage."""
    head, before = build(centers="vpl"), copied(build(centers="learned"))
    train(head, 0, 2)
    assert head.state()["last_embedding"].abs().max() > 0
    head.load_state(before)
    assert head.state()["last_embedding"].abs().max() == 0
    assert differing(build(centers="learned"), before) == []
    train(head, 2, 3)
    anew = build(centers="vpl")
    train(anew, 2, 3)
    assert differing(head, copied(anew)) == []


def test_a_memory_that_a_stage_left_in_a_checkpoint_serves_a_next_stage_of_vpl_and_no_other():
    head = build(centers="vpl")
    train(head, 0, 2)
    at_the_end = copied(head)
    branch = build(centers="learned")
    branch.load_state(at_the_end)
    assert differing(branch, at_the_end) == []
    with torch.no_grad():
        batch = global_batch(NUM_CLASSES)
        scored_without = float(branch(*batch))
        head.set_stage(0.5, "learned", update_expectation=False)
        assert "last_embedding" not in head.state()
        assert scored_without == float(head(*batch))
        branch.set_stage(0.5, "vpl", update_expectation=False)
        head.load_state(at_the_end)
        head.set_stage(0.5, "vpl", update_expectation=False)
        assert scored_without != float(branch(*batch)) == float(head(*batch))
    assert differing(branch, at_the_end) == []
