"""Bytes that the backbone holds on a GPU from forward to backward, worked out layer by layer.

They follow :mod:`model.vit` as it runs on a GPU: attention is flash (16 bits) or memory-efficient (float32) and keeps no [n, n] matrix. (On
a CPU bfloat16 products make float32 copies on the way, and more lives for a moment than is said here.) A ``unit`` below is one tensor
[b, n, width] in the dtype of the weights; n tokens go through the blocks, N through the layers around them.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.vit import IMAGE_SIZE, MLP_RATIO, VitPreset

_BLOCK_UNITS = 8 + 2 * MLP_RATIO  # x, norm1, q, k, v, attention, x + attention, norm2; fc1, relu6
_IN_FLIGHT_UNITS = 2 + MLP_RATIO  # backward of a block's MLP: gradient of x, that of its branch, and those of fc2's input
_FLOAT32, _INDEX = 4, 8  # bytes


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank's micro-batch, by what keeps them."""

    images: int  # [b, 3, 112, 112] float32, the loader's
    patches: int  # the input of the patches' projection
    dropping: int  # all tokens, and the places of those that are not dropped; 0 where none is
    block_inputs: int  # of all blocks
    block_inner: int  # of all blocks, beyond their inputs
    feature: int  # the final norm and the layers after it

    one_block: int  # what a single block keeps beyond its input
    in_flight: int  # gradients on their way through a block
    input_gradient: int  # of one block: what lies between two blocks

    activation_checkpointing: bool

    @property
    def kept(self) -> int:
        """From the end of forward on."""
        return self.patches + self.dropping + self.block_inputs + self.feature + (0 if self.activation_checkpointing else self.block_inner)

    def in_backward(self, blocks_left: int, depth: int) -> int:
        """Peak within the backward of the last of ``blocks_left`` blocks, at least one, recomputed if need be."""
        inner = self.one_block if self.activation_checkpointing else self.one_block * blocks_left
        return self.patches + self.dropping + self.block_inputs * blocks_left // depth + inner + self.in_flight


def activations(
    preset: VitPreset,
    b: int,
    *,
    weight_bytes: int,
    mask_ratio: float = 0.0,
    embedding_size: int = 512,
    activation_checkpointing: bool = False,
) -> Activations:
    """Of ``b`` images in training. ``weight_bytes``: of one weight, 4 for float32, 2 for bfloat16 and float16."""
    N, width = preset.num_tokens, preset.width
    kept = round((1 - mask_ratio) * N)
    unit = b * kept * width * weight_bytes
    full = b * N * width * weight_bytes
    statistics = 2 * _FLOAT32 * b * kept  # mean and deviation of a LayerNorm
    log_sums = (
        _FLOAT32 * b * preset.heads * (-(-kept // 32) * 32 if weight_bytes == _FLOAT32 else kept)
    )  # of attention; flash has no padding
    one_block = (_BLOCK_UNITS - 1) * unit + 2 * statistics + log_sums
    patch = 3 * preset.patch_size**2
    return Activations(
        images=_FLOAT32 * b * 3 * IMAGE_SIZE**2,
        patches=weight_bytes * (b * N + width) * patch,
        dropping=full + _INDEX * b * N if kept < N else 0,  # gather keeps its input; the kept places are a view of all, sorted
        block_inputs=preset.depth * unit,
        block_inner=preset.depth * one_block,
        # input and output of the norm, its statistics, and of the two layers: their output in float32, BatchNorm's, in the weights' dtype
        feature=2 * full + 2 * _FLOAT32 * b * N + b * (width + embedding_size) * (_FLOAT32 + weight_bytes),
        one_block=one_block,
        in_flight=_IN_FLIGHT_UNITS * unit,
        input_gradient=unit,
        activation_checkpointing=activation_checkpointing,
    )
