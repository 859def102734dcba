"""Floating-point operations of training, counted as the field does for MFU: matrix products alone, a multiplication and an addition each.

What is recomputed (activation checkpointing) is not counted, nor are norms, softmax and the optimizer, which take time but few operations.
"""

from __future__ import annotations

from model.vit import MLP_RATIO, VitPreset

_BACKWARD = 2  # of a product: one more for each operand


def backbone_forward_flops(preset: VitPreset, *, mask_ratio: float = 0.0, embedding_size: int = 512) -> int:
    """Of one image through :class:`model.vit.Vit`, in training: ``mask_ratio`` of its tokens skip the blocks."""
    width, tokens = preset.width, preset.num_tokens
    kept = round((1 - mask_ratio) * tokens)
    patches = tokens * width * 3 * preset.patch_size**2
    projections = kept * width * width * (4 + 2 * MLP_RATIO)  # q, k, v, proj; fc1, fc2
    attention = 2 * kept * kept * width
    feature = tokens * width * width + width * embedding_size
    return 2 * (patches + preset.depth * (projections + attention) + feature)


def backbone_flops(preset: VitPreset, *, mask_ratio: float = 0.0, embedding_size: int = 512) -> int:
    """Of one image forward and backward. The pixels need no gradient, so the patches' projection has one backward product."""
    patches = 2 * preset.num_tokens * preset.width * 3 * preset.patch_size**2
    return (1 + _BACKWARD) * backbone_forward_flops(preset, mask_ratio=mask_ratio, embedding_size=embedding_size) - patches


def head_flops(images: int, classes: float, embedding_size: int, *, terms: int = 1, trained_terms: int = 1) -> float:
    """Of a global micro-batch of ``images`` against ``classes`` scored ones, whoever owns them, gradients included.

    Args:
        terms: anchors whose negatives are scored, each with its logits and the gradient of the samples.
        trained_terms: those whose centers have a gradient too.
    """
    return 2 * images * classes * embedding_size * (2 * terms + trained_terms)
