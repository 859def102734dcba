"""Bytes of live tensors, counted as torch's operations make them: independent of what train.memory works out.

Everything runs without a GPU, yet with the operations of one: on the ``meta`` device, which has shapes and no data, the backbone takes the
branches of a GPU and the tensors that it makes are counted at full size.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import optimizer, sharded_softmax, vit
from model.collectives import Collectives, Started
from model.head_memory import HeadShape
from model.kernels.products import Products
from model.micro_batch import Choice
from model.partial_fc import PartialFC, _Loss


class TensorMemory(TorchDispatchMode):
    """Counts the storages that live while it is entered, and the highest sum of them, in bytes.

    What a rank sends is counted too, as a ring would send it.

    A storage counts from the first operation that returns or takes it. Views share theirs. What a kernel allocates within itself is
    no tensor and is not seen.
    """

    def __init__(self, device_type: str, *existing) -> None:
        """``device_type``: what counts, ``cpu`` or ``meta``; ``existing``: tensors that live already, in any nesting."""
        super().__init__()
        self._device_type = device_type
        self.live = self.peak = self.sent = 0
        self._known: dict[int, weakref.ref] = {}
        self._note(existing)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._note((args, kwargs, result))
        self._count_sent(function.name(), args)
        return result

    def _count_sent(self, name: str, args) -> None:
        """Of reductions to all, twice the tensor; of gathers, and of reductions that scatter, once the larger of their tensors."""
        rounds = 2 if "allreduce" in name else 1 if "allgather" in name or "reduce_scatter" in name else 0
        if name.startswith("c10d::") and rounds:
            tensors = [sum(t.nbytes for t in tree_leaves(nested) if isinstance(t, torch.Tensor)) for nested in args[:2]]
            self.sent += rounds * max(tensors)

    def restart(self) -> None:
        """Forget the peak, and what was sent."""
        self.peak, self.sent = self.live, 0

    def _note(self, nested) -> None:
        for tensor in tree_leaves(nested):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self._device_type:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)

    def _add(self, storage: torch.UntypedStorage) -> None:
        known = self._known.get(id(storage))
        if known is not None and known() is storage:
            return
        key, size = id(storage), storage.nbytes()

        def gone(reference: weakref.ref) -> None:
            self.live -= size
            if self._known.get(key) is reference:
                del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """On ``meta``: attention as a GPU computes it, which keeps no [n, n] matrix, and the head's exponentials as its Triton kernel does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit.F, "scaled_dot_product_attention", _attention)
        patch.setattr(sharded_softmax, "exp_logits", _exp_logits)
        patch.setitem(optimizer._ROWS_AT_ONCE, "meta", optimizer._ROWS_AT_ONCE["cuda"])
        yield


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dtype == torch.float32:  # flash attention has no float32
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _exp_logits(x: Tensor, centers: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """The allocations of model.kernels: partial sums of 128 columns each for bfloat16, nothing of size [n, S] but ``out``."""
    if x.dtype == torch.bfloat16:
        return x.new_empty(-(-len(centers) // 128), len(x), dtype=torch.float32).sum(0)
    return torch.mm(x, centers.T, out=out).exp_().sum(1)


def step_on_meta(name: str, b: int, dtype: torch.dtype, **model_arguments) -> tuple[int, int]:
    """(bytes live after the forward, peak over forward and backward) of a backbone under plain torch, its weights included."""
    with torch.device("meta"), kernels_of_a_gpu():
        net = vit.build_vit(name, **model_arguments)
        for parameter in net.parameters():
            parameter.data = parameter.data.to(dtype)
        images = torch.empty(b, 3, vit.IMAGE_SIZE, vit.IMAGE_SIZE)
        with TensorMemory("meta", *net.parameters(), *net.buffers(), images) as memory:
            embeddings = net(images)
            live = memory.live
            embeddings.backward(torch.empty_like(embeddings))
    return live, memory.peak


class AloneOf(Collectives):
    """Collectives of ``world_size`` ranks that all have the same tensors as this one, which is alone."""

    def __init__(self, world_size: int) -> None:
        super().__init__(None)
        self.world_size = world_size

    def gather(self, x: Tensor) -> Started:
        out = x if self.world_size == 1 else x.repeat(self.world_size, *(1 for _ in x.shape[1:]))
        return lambda: out

    def scatter_sum(self, x: Tensor) -> Started:
        out = x if self.world_size == 1 else x[: len(x) // self.world_size].clone()
        return lambda: out

    def _reduce(self, x: Tensor, op) -> Started:
        return lambda: x


def head_on_meta(shape: HeadShape, **head_arguments) -> tuple[int, int, int]:
    """Bytes beyond the head's state of rank 0: (peak of the loss, what is left for backward and step, peak of backward and step)."""
    with torch.device("meta"), kernels_of_a_gpu():
        head = PartialFC(
            shape.embedding_size,
            shape.classes,
            shape.sample_rate,
            centers=shape.centers,
            optimizer=shape.optimizer,
            product_dtype=torch.float32,
            chunk_rows=shape.chunk_rows,
            curricular=shape.curricular,
            device="meta",
            **head_arguments,
        )
        head.set_stage(shape.sample_rate, shape.centers, shape.update_expectation)
        head._ranks = AloneOf(shape.world_size)
        head._products = Products({2: torch.bfloat16, 4: torch.float32}[shape.product_bytes], torch.device("cuda"))
        b, B, S = shape.micro_batch_size, shape.global_micro_batch, shape.scored
        embeddings = torch.empty(b, shape.embedding_size, requires_grad=True)
        with TensorMemory("meta", *head.state().values(), embeddings) as memory:
            begin = memory.live
            rows = torch.empty(S, dtype=torch.int64) if shape.sample_rate < 1 else None
            remembers = shape.update_expectation or shape.centers == "vpl"
            owned = torch.empty(b, dtype=torch.int64) if remembers else None
            choice = Choice(torch.empty(B, dtype=torch.int64), rows, rows, owned, None)
            loss = _Loss.apply(embeddings, head, choice, True)  # what calling the head comes to; autocast does not know meta
            del rows, owned, choice
            peak, left = memory.peak - begin, memory.live - begin
            memory.restart()
            loss.backward()
            del loss
            embeddings.grad = None
            head.step(1e-3, 0.1)
            return peak, left, memory.peak - begin
