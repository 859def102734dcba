"""exp(logits) of the negatives and its row sums: a Triton kernel for CUDA and its plain-torch twin.

Both compute, for samples x [n, D] that already carry the scale s and unit class centers w [S, D],

    out_ij = exp(x_i . w_j) for j != columns_i, else 0        sums_i = sum_j out_ij, before out is rounded

with the product accumulated, and exp taken, in float32. bfloat16 logits would not do: rounding a logit near 64 to 8 bits changes its exp
by up to 13 %. In the kernel the float32 logits [n, S] never reach memory; what does is ``out`` in the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exp_logits(x: Tensor, centers: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """Write exp(logits) of the negatives to ``out`` and return their row sums: the Triton kernel for bfloat16 on CUDA, else the twin.

    No gradient flows through either.

    Args:
        x: [n, D] bfloat16 or float32 samples times the scale s, n >= 1. Logits must stay below 88, where a float32 exp overflows.
        centers: [S, D] unit rows in the dtype of x; S may be 0.
        columns: [n] int64 column of each row's own class, in [-1, S); -1 where this rank does not hold it. Not checked: a look at its
            values would wait for the device.
        out: [n, S] in the dtype of x, overwritten: exp(x @ centers.T), exactly 0 in each row's own column. A view is fine; on CUDA its
            rows must be contiguous, and strides between rows that are multiples of 16 let the kernel read and write whole vectors.

    Returns: [n] float32 row sums of the float32 exps before they are rounded to the dtype of ``out``, own column excluded.

    Raises:
        ValueError: shapes that do not fit, another dtype, or, for the kernel, elements of a row that are not adjacent.
    """
    if x.is_cuda and x.dtype == torch.bfloat16:
        return exp_logits_triton(x, centers, columns, out)
    return exp_logits_torch(x, centers, columns, out)


def exp_logits_triton(x: Tensor, centers: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """:func:`exp_logits` of bfloat16 in one kernel: CUDA tensors, or CPU tensors where TRITON_INTERPRET=1 stood before Triton's import."""
    _check(x, centers, columns, out)
    if x.dtype != torch.bfloat16:
        raise ValueError(f"the kernel multiplies bfloat16, got {x.dtype}")
    for name, tensor in (("x", x), ("centers", centers), ("columns", columns), ("out", out)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"elements of a row of {name} must be adjacent, got strides {tensor.stride()}")
    if centers.shape[0] == 0:
        return x.new_zeros(x.shape[0], dtype=torch.float32)
    from model.kernels._exp_logits_triton import launch  # on first use: a CPU machine need not have Triton

    return launch(x, centers, columns, out)


def exp_logits_torch(x: Tensor, centers: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """:func:`exp_logits` in plain torch. Float32 is worked on inside ``out``; bfloat16 needs a float32 [n, S] on the way."""
    _check(x, centers, columns, out)
    if x.dtype == torch.float32:
        exps = torch.mm(x, centers.T, out=out)
    elif x.is_cuda:
        exps = torch.mm(x, centers.T, out_dtype=torch.float32)
    else:  # the CPU has no mm with out_dtype; products of bfloat16 are exact in float32
        exps = torch.mm(x.float(), centers.float().T)
    write_own(exps.exp_(), columns, exps.new_zeros(x.shape[0]))
    if exps is not out:
        out.copy_(exps)
    return exps.sum(1)


def write_own(matrix: Tensor, columns: Tensor, values: Tensor) -> None:
    """``matrix[i, columns[i]] = values[i]`` for each row i of [n, S] whose column [n] int64 is not -1.

    Every row writes one entry, a row without own column its old value: choosing rows by nonzero() would wait for the device.
    """
    if not matrix.shape[1]:
        return
    entry = columns.clamp(min=0).unsqueeze(1)
    written = torch.where(columns.unsqueeze(1) >= 0, values.unsqueeze(1).to(matrix.dtype), matrix.gather(1, entry))
    matrix.scatter_(1, entry, written)


def _check(x: Tensor, centers: Tensor, columns: Tensor, out: Tensor) -> None:
    """ValueError unless shapes and dtypes fit."""
    n, size = x.shape
    if centers.shape[1:] != (size,) or columns.shape != (n,) or out.shape != (n, centers.shape[0]):
        shapes = [tuple(t.shape) for t in (x, centers, columns, out)]
        raise ValueError("x, centers, columns, out must be [n, D], [S, D], [n], [n, S], got {}, {}, {}, {}".format(*shapes))
    if x.dtype not in (torch.bfloat16, torch.float32) or centers.dtype != x.dtype or out.dtype != x.dtype or columns.dtype != torch.int64:
        dtypes = [t.dtype for t in (x, centers, out, columns)]
        raise ValueError("x, centers, out must share bfloat16 or float32 and columns be int64, got {}, {}, {}, {}".format(*dtypes))
