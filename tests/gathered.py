"""The backbone of an engine, gathered by DeepSpeed and collectives: what the pieces of a checkpoint are compared with."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def full_backbone_weights(engine, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """On the group's rank 0 the whole backbone, float32 on the CPU, under its released key names; an empty dict on the others.

    Parameters are ZeRO's float32 master weights, gathered one at a time. BatchNorm statistics differ per rank (each saw its own batches)
    and are pooled: the mean of the means, and the mean of the variances plus the variance of the means. Collectives: one gather per
    parameter, two all-reduces per BatchNorm.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    keep = dist.get_rank(group) == 0

    def add(name: str, tensor: Tensor) -> None:
        if keep:
            weights[name] = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)

    for name, parameter in engine.module.named_parameters():
        add(name, safe_get_full_fp32_param(parameter))
    for name, module in engine.module.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            mean, variance = _pooled_statistics(module, group)
            add(f"{name}.running_mean", mean)
            add(f"{name}.running_var", variance)
            add(f"{name}.num_batches_tracked", module.num_batches_tracked)
    return weights


def _pooled_statistics(module: nn.modules.batchnorm._BatchNorm, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    mean = module.running_mean.double().clone()
    second_moment = module.running_var.double() + mean.square()
    for moment in (mean, second_moment):
        dist.all_reduce(moment, group=group)
        moment /= dist.get_world_size(group)
    return mean, second_moment - mean.square()
