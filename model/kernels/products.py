"""Matrix products with operands of one dtype, and sums and results in float32."""

from __future__ import annotations

import torch
from torch import Tensor


class Products:
    """Products of float32 or bfloat16 operands that never round a sum or a result below float32.

    bfloat16 results would cost 2-7 % of the gradient, because exp multiplies the error of a logit by the logit; bfloat16 operands cost
    0.3 %. On CUDA, cuBLAS takes bfloat16 operands and writes float32. No CPU product of torch does, so there an operand is rounded to
    bfloat16 and kept in float32: the same numbers, at float32's speed. On CUDA float32 operands follow
    ``torch.backends.cuda.matmul.allow_tf32``, off by default.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """ValueError unless ``dtype`` is float32 or bfloat16."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"product_dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        self.dtype = dtype  # what operands are rounded to
        self.storage = dtype if device.type == "cuda" else torch.float32  # what they are kept in

    @property
    def exact(self) -> bool:
        """Whether an operand is the float32 tensor itself."""
        return self.dtype == torch.float32

    @property
    def rounds_in_float32(self) -> bool:
        """Whether operands are rounded and stay float32."""
        return self.dtype != self.storage

    def operand(self, x: Tensor) -> Tensor:
        """x [n, m] float32 as an operand; x itself if nothing is rounded."""
        return x.to(self.dtype).to(self.storage)

    def mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b, float32. ``out``: a float32 tensor to write to."""
        if self.storage == torch.float32:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=torch.float32) if out is None else torch.mm(a, b, out_dtype=torch.float32, out=out)

    def add_mm(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b; ``total`` float32 (beside bfloat16 operands torch allows that since 2.10)."""
        if self.storage == torch.float32:
            total.addmm_(a, b)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
