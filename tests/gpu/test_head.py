"""The head on a GPU: its kernel against the plain-torch twin, its numbers against float64, and that a step never makes the host wait."""

import subprocess
import sys

import pytest
import torch

from model.kernels.exp_logits import exp_logits_torch, exp_logits_triton
from model.partial_fc import CENTERS, PartialFC
from tests.heads import HEADS, VARIANTS, allowed
from tests.reference import head_reference, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the head and its Triton kernel were not run on a GPU"),
]
SETTINGS = {"margin": (1.0, 0.5, 0.0), "scale": 64.0, "margin_gradient": "exact"}


def problem(centers, product_dtype, variant="plain", classes=1003, size=512, batch=600):
    """A head whose classes all have expectations near their centers, and samples near them, as in training.

    For VPL the expectations are its memory too, of which every second class's is too old.
    """
    generator = torch.Generator().manual_seed(0)
    head = PartialFC(size, classes, 1.0, **SETTINGS | VARIANTS[variant], product_dtype=product_dtype, device="cuda")
    directions = torch.nn.functional.normalize(head.weight.cpu())
    near = torch.nn.functional.normalize(directions + 0.04 * torch.randn(classes, size, generator=generator))
    head.set_stage(1.0, centers, update_expectation=True)
    state = {name: tensor.clone() for name, tensor in head.state().items()}
    state |= {"expectation": near, "expectation_seen": torch.ones(classes, dtype=torch.bool)}
    if centers == "vpl":
        state |= {"last_embedding": near, "last_embedding_step": 49 + torch.arange(classes) % 2, "applied_steps": torch.tensor(250)}
    head.load_state(state)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    embeddings = directions[labels] + 0.06 * torch.randn(batch, size, generator=generator)
    return head, embeddings, labels


def gradients(head, embeddings, labels):
    embeddings = embeddings.cuda().requires_grad_()
    loss = head(embeddings, labels.cuda())
    loss.backward()
    return loss.detach(), embeddings.grad, head.pending_gradient()[1]


@pytest.mark.parametrize("num_classes", [32_001, 32_000, 100])
@pytest.mark.parametrize("n", [512, 1, 300])
def test_kernel_matches_its_twin(n, num_classes):
    generator = torch.Generator().manual_seed(0)
    x, centers = (torch.nn.functional.normalize(torch.randn(rows, 512, generator=generator)) for rows in (n, num_classes))
    x, centers = (64 * x).bfloat16().cuda(), centers.bfloat16().cuda()
    columns = torch.randint(-1, num_classes, (n,), generator=generator).cuda()
    outs = [torch.full((n, num_classes + 7), torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    sums = [run(x, centers, columns, out[:, :num_classes]) for run, out in zip((exp_logits_triton, exp_logits_torch), outs, strict=True)]
    # The order of 512 additions below 64 each, as an error of the exponent; and one rounding to bfloat16, which may fall either way.
    torch.testing.assert_close(*sums, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(outs[0][:, :num_classes], outs[1][:, :num_classes], rtol=2.0**-7 + 1e-3, atol=2.0**-126)
    held = columns >= 0
    assert (outs[0][held, columns[held]] == 0).all()
    assert outs[0][:, num_classes:].isnan().all(), "wrote beside out"


@pytest.mark.parametrize("centers", CENTERS)
def test_float32_products_are_as_exact_as_on_a_cpu(centers):
    head, embeddings, labels = problem(centers, torch.float32)
    check_against_reference(head, embeddings, labels, allowed(centers))


@pytest.mark.parametrize("centers", CENTERS)
def test_bfloat16_operands_cost_no_more_of_a_gradient_than_the_rounding_of_a_logit(centers):
    check_against_reference(*problem(centers, torch.bfloat16), allowed(centers, torch.bfloat16))


def check_against_reference(head, embeddings, labels, error):
    weight, expectation, seen = head.weight.cpu().clone(), head.expectation.cpu().clone(), head.expectation_seen.cpu()
    prototypes = {"expectation": expectation, "seen": seen, "memory": expectation, "share": 0.15 * (torch.arange(len(weight)) % 2)}
    expected = head_reference(embeddings, weight, labels, **SETTINGS, centers=head.centers, **prototypes)
    loss, embeddings_grad, centers_grad = gradients(head, embeddings, labels)
    assert relative_error(loss.cpu(), expected.loss) < error
    assert relative_error(embeddings_grad.cpu(), expected.embeddings_grad) < error
    assert head.centers == "replace" or relative_error(centers_grad.cpu(), expected.centers_grad) < error


@pytest.mark.parametrize("centers", CENTERS)
def test_the_same_call_gives_the_same_bits(centers):
    first, second = (gradients(*problem(centers, torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize(("variant", "centers"), HEADS)
def test_a_step_after_prepare_never_makes_the_host_wait(variant, centers, sample_rate):
    head, embeddings, labels = problem(centers, torch.bfloat16, variant)
    head.set_stage(sample_rate, centers, update_expectation=True)
    embeddings, labels = embeddings.cuda().requires_grad_(), labels.cuda()
    for checked in (False, True):  # the first step compiles the kernel
        head.prepare(labels)
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            head(embeddings, labels).backward()
            head.gradient_norm()
            head.step(1e-3, 0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_benchmark_runs(tmp_path):
    command = [sys.executable, "-m", "tests.bench.bench_head", "--device", "cuda", "--sizes", "tiny", "--out", str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == 0
