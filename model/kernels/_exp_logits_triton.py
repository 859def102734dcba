"""The Triton kernel of :mod:`model.kernels.exp_logits`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not tuned at run time: the order of summation would follow the choice, and two machines, or a resumed run, would then differ in bits.
_BLOCK_M, _BLOCK_N, _BLOCK_K, _NUM_WARPS, _NUM_STAGES = 128, 128, 64, 8, 3
# Row blocks that pass over one block of centers before the next is read. The larger, the fewer times the centers come from memory;
# 16 blocks of 128 rows of x [D = 512] are 2 MiB, which stay in L2.
_GROUP_M = 16


@triton.jit
def _exp_logits_kernel(
    x,  # [n, D] bfloat16, row stride x_stride
    centers,  # [S, D] bfloat16
    columns,  # [n] int64
    out,  # [n, S] bfloat16
    partial_sums,  # [ceil(S / BLOCK_N), n] float32, contiguous
    n,
    S,
    D,
    x_stride,
    centers_stride,
    out_stride,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row_blocks = tl.cdiv(n, BLOCK_M)
    column_blocks = tl.cdiv(S, BLOCK_N)
    # Programs run about in order of their id: GROUP_M row blocks fastest, then the column blocks, then the next group of rows.
    program = tl.program_id(0)
    group = program // (GROUP_M * column_blocks)
    within_group = program % (GROUP_M * column_blocks)
    group_rows = tl.minimum(row_blocks - group * GROUP_M, GROUP_M)
    row_block = group * GROUP_M + within_group % group_rows
    column_block = within_group // group_rows

    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the end read the last one, which costs less than a mask at every step; nothing of them is stored. Offsets in int64:
    # n * S passes 2**31 with n = 1024 and S = 2.1 M, S * D with D = 1024 and S = 2.1 M.
    x_tile = x + tl.minimum(row, n - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    centers_tile = centers + tl.minimum(column, S - 1).to(tl.int64)[None, :] * centers_stride + k[:, None]

    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        a = tl.load(x_tile, mask=k[None, :] < D - start, other=0.0)
        b = tl.load(centers_tile, mask=k[:, None] < D - start, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        logits = tl.dot(a, b, logits)
        x_tile += BLOCK_K
        centers_tile += BLOCK_K

    in_rows = row < n
    own = tl.load(columns + row, mask=in_rows).to(tl.int32)  # compared with every column: half the work of int64
    negative = (column[None, :] < S) & (column[None, :] != own[:, None])
    exps = tl.where(negative, tl.exp(logits), 0.0)
    out_tile = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out_tile, exps.to(out.dtype.element_ty), mask=in_rows[:, None] & (column[None, :] < S))
    tl.store(partial_sums + column_block.to(tl.int64) * n + row, tl.sum(exps, axis=1), mask=in_rows)


# TRITON_INTERPRET was read when the kernel was decorated above. The interpreter holds bfloat16 as 16-bit integers and multiplies those:
# it must be handed float32.
_INTERPRETED = not isinstance(_exp_logits_kernel, triton.JITFunction)


def launch(x: Tensor, centers: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """:func:`model.kernels.exp_logits.exp_logits` for bfloat16 and S >= 1, its operands not checked."""
    (n, D), S = x.shape, centers.shape[0]
    blocks = (16, 16, 16) if _INTERPRETED else (_BLOCK_M, _BLOCK_N, _BLOCK_K)
    row_blocks, column_blocks = triton.cdiv(n, blocks[0]), triton.cdiv(S, blocks[1])
    partial_sums = torch.empty(column_blocks, n, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        _exp_logits_kernel[(row_blocks * column_blocks,)](
            x,
            centers,
            columns,
            out,
            partial_sums,
            n,
            S,
            D,
            x.stride(0),
            centers.stride(0),
            out.stride(0),
            UPCAST=_INTERPRETED,
            BLOCK_M=blocks[0],
            BLOCK_N=blocks[1],
            BLOCK_K=blocks[2],
            GROUP_M=_GROUP_M,
            num_warps=_NUM_WARPS,
            num_stages=_NUM_STAGES,
        )
    return partial_sums.sum(0)
