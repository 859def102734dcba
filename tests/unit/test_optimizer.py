import pytest
import torch

from model.optimizer import DenseAdamW, RowSparseAdamW, add_rows, build_centers_optimizer
from tests.reference import adamw_reference, relative_error


def make_steps(count, classes=30, size=16, rows_per_step=None):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        rows = torch.randperm(classes, generator=generator)[: rows_per_step or classes].sort().values
        yield rows, torch.randn(rows.numel(), size, generator=generator)


@pytest.mark.parametrize("kind", [RowSparseAdamW, DenseAdamW])
def test_equals_torch_adamw_when_every_row_is_sampled(kind):
    weight = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    parameter = torch.nn.Parameter(weight.double().clone())
    expected, actual = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1), kind(weight)
    for rows, grad in make_steps(50):
        parameter.grad = grad.double()
        expected.step()
        actual.step(rows, grad, lr=1e-2, weight_decay=0.1)
    assert relative_error(weight, parameter.detach()) < 2e-6


def test_row_sparse_touches_sampled_rows_only_and_counts_steps_per_row():
    weight = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    start, optimizer, history = weight.clone(), RowSparseAdamW(weight), []
    for rows, grad in make_steps(20, rows_per_step=4):
        optimizer.step(rows, grad, lr=1e-2, weight_decay=0.1)
        history.append(dict(zip(rows.tolist(), grad, strict=True)))
    untouched = sorted(set(range(30)) - {row for step in history for row in step})
    assert untouched, "the test must leave some row alone"
    assert torch.equal(weight[untouched], start[untouched])
    assert relative_error(weight, adamw_reference(start, history, lr=1e-2, weight_decay=0.1)) < 2e-6


def test_dense_moves_rows_that_were_not_sampled():
    weight = torch.ones(3, 2)
    DenseAdamW(weight).step(torch.tensor([1]), torch.ones(1, 2), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(weight[0], torch.full((2,), 0.95))


@pytest.mark.parametrize("kind", ["row_sparse", "dense"])
@pytest.mark.parametrize("classes", [30, 0])
def test_state_continues_bit_for_bit(kind, classes):
    weight = torch.randn(classes, 16)
    optimizer = build_centers_optimizer(kind, weight, (0.9, 0.999), 1e-8)
    steps = list(make_steps(6, classes=classes))
    for rows, grad in steps[:3]:
        optimizer.step(rows, grad, lr=1e-2, weight_decay=0.1)
    copy = weight.clone()
    resumed = build_centers_optimizer(kind, copy, (0.9, 0.999), 1e-8)
    resumed.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    for rows, grad in steps[3:]:
        optimizer.step(rows, grad, lr=1e-2, weight_decay=0.1)
        resumed.step(rows, grad, lr=1e-2, weight_decay=0.1)
    assert torch.equal(weight, copy)


@pytest.mark.parametrize("kind", [RowSparseAdamW, DenseAdamW])
def test_no_rows_named_means_every_row(kind):
    weights = [torch.randn(1500, 16, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    named, unnamed = (kind(weight) for weight in weights)
    for rows, grad in make_steps(3, classes=1500):
        named.step(rows, grad, lr=1e-2, weight_decay=0.1)
        unnamed.step(None, grad, lr=1e-2, weight_decay=0.1)
    assert torch.equal(*weights)


def sparse(rows, *values):
    return None if rows is None else torch.tensor(rows), torch.tensor(values).unsqueeze(1)


@pytest.mark.parametrize(
    ("one", "other", "total"),
    [
        (sparse([1, 4], 1.0, 2.0), sparse([0, 4], 3.0, 5.0), sparse([0, 1, 4], 3.0, 1.0, 7.0)),
        (sparse([1, 2], 1.0, 2.0), sparse(None, 1.0, 1.0, 1.0), sparse(None, 1.0, 2.0, 3.0)),
        (sparse(None, 1.0, 1.0, 1.0), sparse([0], 1.0), sparse(None, 2.0, 1.0, 1.0)),
        (sparse(None, 1.0, 2.0), sparse(None, 3.0, 4.0), sparse(None, 4.0, 6.0)),
    ],
)
def test_gradients_add_up_row_by_row(one, other, total):
    rows, values = add_rows(one, other)
    assert rows is total[0] is None or torch.equal(rows, total[0])
    assert torch.equal(values, total[1])
