"""The backbone under DeepSpeed: its optimizer, its engine, and its weights gathered in float32."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config import ConfigError, OptimizerConfig


def build_engine(backbone: nn.Module, optimizer: OptimizerConfig, ds_config: dict):
    """``deepspeed.initialize`` with the recipe's optimizer; the head stays outside.

    Clipping, accumulation and precision stand in ``ds_config`` (see train.ds_config). Collectives: parameters are broadcast from rank 0.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(model=backbone, optimizer=_build_optimizer(backbone, optimizer), config=ds_config)
    return engine


def _build_optimizer(backbone: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    settings = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": config.betas, "eps": config.eps}
    on_gpu = torch.cuda.is_available()
    if config.impl == "torch":
        return torch.optim.AdamW(backbone.parameters(), fused=True, **settings)
    if config.impl == "deepspeed":  # compiled on first use
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        return (FusedAdam if on_gpu else DeepSpeedCPUAdam)(backbone.parameters(), adamw_mode=True, **settings)
    try:
        import amp_C  # noqa: F401 - the compiled half of NVIDIA's apex; the PyPI package named apex does not have it
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ConfigError(
            f"optimizer.impl: apex needs NVIDIA apex with its CUDA extensions ({error}), which is not the apex of PyPI: use NVIDIA's "
            "container, or build its source with `APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation .`; "
            "or set optimizer.impl=torch"
        ) from error
    return FusedAdam(backbone.parameters(), adam_w_mode=True, **settings)


def set_learning_rate(engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def loss_scale(engine) -> float:
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def full_backbone_weights(engine, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The whole backbone on every rank, float32 on the CPU, under its released key names.

    Parameters are ZeRO's float32 master weights. BatchNorm statistics differ per rank (each saw its own batches) and are pooled: the mean
    of the means, and the mean of the variances plus the variance of the means. Collectives: one gather per parameter, two all-reduces
    per BatchNorm.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in engine.module.named_parameters()}
    for name, module in engine.module.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            weights[f"{name}.running_mean"], weights[f"{name}.running_var"] = _pooled_statistics(module, group)
            weights[f"{name}.num_batches_tracked"] = module.num_batches_tracked
    return {
        name: weights[name].detach().to("cpu", torch.float32 if weights[name].is_floating_point() else None).clone()
        for name in engine.module.state_dict()
    }


def _pooled_statistics(module: nn.modules.batchnorm._BatchNorm, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    mean = module.running_mean.double().clone()
    second_moment = module.running_var.double() + mean.square()
    for moment in (mean, second_moment):
        dist.all_reduce(moment, group=group)
        moment /= dist.get_world_size(group)
    return mean, second_moment - mean.square()
