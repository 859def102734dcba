"""The backbone under DeepSpeed: its optimizer and its engine."""

from __future__ import annotations

import torch
from torch import nn

from train.config import ConfigError, OptimizerConfig


def build_engine(backbone: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict, *, compiled: bool = False):
    """``deepspeed.initialize`` of the backbone alone; the head stays outside.

    Clipping, accumulation and precision stand in ``ds_config`` (see train.ds_config). Collectives: parameters are broadcast from rank 0.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(model=backbone, optimizer=optimizer, config=ds_config)
    if compiled:
        compile_in_place(engine.module)
    return engine


def compile_in_place(backbone: nn.Module) -> None:
    """Compile ``backbone`` at its first call, once for training and once for evaluation. The keys of its state_dict stay as they are.

    Random numbers still come from torch's own generator and in the same order, so dropped patches and paths are those of the eager run.
    """
    backbone.compile(options={"fallback_random": True})


def require_compiler(device: torch.device) -> None:
    """Compile a trifle for ``device``; ConfigError if that fails. ``torch.compile`` itself would fail at the first step, at length."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds: no compiler, one without Python's headers, no Triton
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model.compile: torch.compile does not work here ({reason}): it needs a C++ compiler and Python's headers, on Debian "
            "`apt-get install g++ python3-dev` (CXX names another compiler); or set model.compile=false"
        ) from error


def parameters_without_decay(backbone: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone: LayerNorm's and BatchNorm's, every bias, ``pos_embed`` and ``mask_token``.

    Decay is for matrices: an offset or a norm's gain pulled towards 0 regularises nothing. ``mask_token`` would even shrink where no token
    is ever dropped, because ZeRO gives the optimizer zeros for a parameter without a gradient, where plain torch passes over it.
    """
    norms = nn.LayerNorm, nn.modules.batchnorm._BatchNorm
    return {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in backbone.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if isinstance(module, norms) or name in ("bias", "pos_embed", "mask_token")
    }


def parameter_groups(backbone: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Every parameter in exactly one group: with ``weight_decay``, and (unless ``decay_all``) without. Groups are never empty."""
    spared = set() if config.decay_all else parameters_without_decay(backbone)
    decayed = [parameter for name, parameter in backbone.named_parameters() if name not in spared]
    others = [parameter for name, parameter in backbone.named_parameters() if name in spared]
    groups = ({"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]  # ZeRO cannot flatten an empty one


def build_optimizer(backbone: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over :func:`parameter_groups` as the recipe says; ConfigError if that needs NVIDIA apex and it is not there."""
    groups = parameter_groups(backbone, config)
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.impl == "torch":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if config.impl == "deepspeed":  # compiled on first use
        from deepspeed.accelerator import get_accelerator
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        kind = FusedAdam if get_accelerator().device_name() == "cuda" else DeepSpeedCPUAdam
        return kind(groups, adamw_mode=True, **settings)
    try:
        import amp_C  # noqa: F401 - the compiled half of NVIDIA's apex; the PyPI package named apex does not have it
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ConfigError(
            f"optimizer.impl: apex needs NVIDIA apex with its CUDA extensions ({error}), which is not the apex of PyPI: use NVIDIA's "
            "container, or build its source with `APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation .`; "
            "or set optimizer.impl=torch"
        ) from error
    return FusedAdam(groups, adam_w_mode=True, **settings)


def set_learning_rate(engine, lr: float) -> None:
    """Of every parameter group, from the next step on."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def set_batch(engine, micro_batch_size: int, grad_accum_steps: int) -> None:
    """Set batch and accumulation of the coming steps, between two steps."""
    engine.set_train_micro_batch_size(micro_batch_size)
    engine.set_train_batch_size(micro_batch_size * grad_accum_steps * engine.dp_world_size)
    engine.micro_steps = 0  # DeepSpeed takes a step where this count is a multiple of the accumulation, whatever it was before
    engine.optimizer.gradient_accumulation_steps = grad_accum_steps  # what ZeRO's offload goes by


def loss_scale(engine) -> float:
    return float(getattr(engine.optimizer, "loss_scale", 1.0))
