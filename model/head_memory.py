"""Bytes that the head of one rank holds on a GPU, worked out tensor by tensor from :mod:`model.partial_fc`.

Letters as there: b images a rank, B over all ranks, c classes on this rank, S of them scored, D the embedding size. n is the number of
samples that share the buffer of logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.class_shard import ClassShard
from model.sharded_softmax import BLOCK_COLUMNS

_FLOAT32, _FLOAT64, _INDEX = 4, 8, 8  # bytes
_ROWS_OF_A_STEP = 16384  # that the optimizer updates at a time on a GPU


@dataclass(frozen=True)
class HeadShape:
    """What the bytes of a head depend on: sizes, and what a stage of the run asks for."""

    embedding_size: int  # D
    num_classes: int  # C over all ranks
    world_size: int
    micro_batch_size: int  # b
    rank: int = 0  # rank 0 owns as many classes as any
    grad_accum_steps: int = 1
    sample_rate: float = 1.0
    centers: str = "learned"
    update_expectation: bool = False
    optimizer: str = "row_sparse"
    product_bytes: int = 2  # of an operand of matrix products: 2 for bfloat16, 4 for float32
    chunk_rows: int = 4096
    curricular: bool = False
    uniface: bool = False
    logits_in_float32: bool = False  # as a filter and logits that are shifted ask for, whatever the products' dtype

    @property
    def classes(self) -> int:
        """c."""
        return len(ClassShard(self.num_classes, self.rank, self.world_size))

    @property
    def global_micro_batch(self) -> int:
        """B."""
        return self.micro_batch_size * self.world_size

    @property
    def scored(self) -> int:
        """S as it is on average: the draw is over all classes, and a rank's part varies by chance (see model.class_shard)."""
        if self.sample_rate == 1.0:
            return self.classes
        return min(self.classes, -(-max(int(self.sample_rate * self.num_classes), self._positives()) // self.world_size))

    def scored_in(self, micro_batches: int) -> int:
        """Classes of this rank that at least one of so many independent draws scores, on average."""
        if not self.classes:
            return 0
        return round(self.classes * (1 - (1 - self.scored / self.classes) ** micro_batches))

    def _positives(self) -> int:
        """Distinct classes of B samples whose classes are drawn alike."""
        return round(self.num_classes * (1 - (1 - 1 / self.num_classes) ** self.global_micro_batch))


@dataclass(frozen=True)
class HeadMemory:
    """Bytes of one rank. ``weight`` to ``remembered`` are there all the time, the others as their comments say."""

    weight: int  # the class centers
    moments: int  # AdamW's
    step_counts: int  # one a class, if the optimizer is row_sparse
    expectation: int  # with the mark of those that exist
    remembered: int  # VPL's last embeddings

    gathered: int  # while the loss is computed: embeddings, labels and cosines of all ranks
    operands: int  # then too: the anchors' unit rows
    buffer: int  # then too: logits of a chunk, and what CurricularFace, a filter, UniFace or a shift add to them
    gradients: int  # then too: of the samples and of the class centers
    passing: int  # then too: products of a chunk

    pending: int  # from there to the optimizer's step, over the micro-batches: the centers' gradient and the samples of this rank
    adding: int  # for a moment, when backward adds a micro-batch's to it
    earlier: int  # what earlier micro-batches of the step have left, as the last one begins
    stepping: int  # within the optimizer's step

    @property
    def state(self) -> int:
        """What a run keeps, and a checkpoint holds."""
        return self.weight + self.moments + self.step_counts + self.expectation + self.remembered

    @property
    def call(self) -> int:
        """Peak of the loss of the last micro-batch, beyond :attr:`state`."""
        return self.earlier + self.gathered + self.operands + self.buffer + self.gradients + self.passing


def head_memory(shape: HeadShape) -> HeadMemory:
    """All of it, for one stage of a run."""
    D, c, S, b, B = shape.embedding_size, shape.classes, shape.scored, shape.micro_batch_size, shape.global_micro_batch
    row, several, learned = _FLOAT32 * D, shape.world_size > 1, shape.centers != "replace"
    sampled = shape.sample_rate < 1.0
    scored_anchors = 2 if shape.centers in ("pco", "epl") else 1
    anchors = 2 if shape.centers in ("pco", "pco_shared", "epl") else 1
    n = min(shape.chunk_rows, B)

    columns = -(-S // 16) * 16  # the rows of the buffer begin at multiples of it
    low = shape.product_bytes < _FLOAT32
    buffers = shape.product_bytes + _FLOAT32 * (shape.curricular + (low and (shape.curricular or shape.uniface or shape.logits_in_float32)))
    # What changes logits one by one works on a block of columns at a time, with so many temporaries of it.
    block_temporaries = _FLOAT32 * n * min(BLOCK_COLUMNS, S) * (6 * shape.curricular + 5 * shape.uniface)

    rows = _INDEX * S * sampled
    of_learned = (shape.product_bytes * D + _FLOAT32) * S * learned  # unit rows and their norms
    whole_table = not low and not sampled  # then the expectations are operands as they are
    expectations_used = scored_anchors == 2 or shape.centers == "replace" or (shape.centers == "pco_shared" and not low)
    of_expectation = shape.product_bytes * D * S * expectations_used * (not whole_table)

    one = (row * S + rows) * learned  # the centers' gradient of a micro-batch, and which rows it is of
    remembers = shape.update_expectation or shape.centers == "vpl"
    owned = (row + 2 * _INDEX) * b * remembers  # samples whose class is here: b on average

    def sum_of(micro_batches: int) -> int:
        """Gradient of as many micro-batches together."""
        if not micro_batches or not learned:
            return 0
        return (row + _INDEX) * shape.scored_in(micro_batches) if sampled else row * c

    earlier_gradient = sum_of(shape.grad_accum_steps - 1)
    total = sum_of(shape.grad_accum_steps)
    united = total if earlier_gradient and sampled else 0
    step_rows = min(_ROWS_OF_A_STEP, S * learned)
    copies = 5 if sampled else 3  # of these rows: two temporaries and the gradient's mean; and where rows are chosen, weight and moments
    return HeadMemory(
        weight=row * c,
        moments=2 * row * c,
        step_counts=4 * c * (shape.optimizer == "row_sparse"),
        expectation=(row + 1) * c,
        remembered=(row + _INDEX) * c * (shape.centers == "vpl"),
        gathered=row * (b + B * several) + B * (_INDEX * (1 + anchors * sampled) + 2 * _FLOAT64 * anchors + 4 * _FLOAT64),
        operands=rows + of_learned + of_expectation,
        buffer=n * columns * buffers,
        gradients=row * (B + S * learned),
        passing=max(row * n * (2 * scored_anchors + 1 + (low and shape.centers == "vpl")), block_temporaries),
        pending=earlier_gradient + one + owned * shape.grad_accum_steps + row * b,
        adding=united,
        earlier=earlier_gradient + owned * (shape.grad_accum_steps - 1),
        stepping=total * (shape.grad_accum_steps > 1)
        + row * (copies * step_rows if shape.optimizer == "row_sparse" else c * sampled * learned),
    )
