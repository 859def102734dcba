"""DeepSpeed's JSON, made safe: unknown keys and broken combinations are refused, what the recipe owns is filled in.

DeepSpeed (0.19.8) accepts a misspelt top-level key in silence (``zero_optimisation`` trains at stage 0), takes ``"auto"`` inside a
section for its own default, and clips at 1.0 unless told otherwise. Owners: the JSON has ZeRO stage, precision, loss scale and
communication; the recipe has batch, optimizer, learning rate and clipping. ``ds_configs/README.md`` is the user's page on this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from train.config import RunConfig
from train.document import ConfigError, Document, Key, Problem, did_you_mean, read_json, show
from train.explain import explain

# Top-level keys the recipe owns; "auto" or left out means: fill in.
OWNED_BY_RECIPE = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")

# Single values. DeepSpeed does not check their types: "wall_clock_breakdown": "false" would be true.
VALUES: dict[str, type | tuple[str, ...]] = {
    "communication_data_type": ("fp32", "bf16", "fp16"),
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "log_level": ("debug", "info", "warning", "error", "critical"),
}

# Sections that DeepSpeed reads without looking for misspelt keys, and the keys we support in them.
UNCHECKED_SECTIONS: dict[str, dict[str, type | tuple[str, ...]]] = {
    "torch_autocast": {"enabled": bool, "dtype": ("bfloat16", "float16"), "lower_precision_safe_modules": list},
    "data_types": {"grad_accum_dtype": ("fp32", "bf16", "fp16"), "keep_in_fp32_modules": list},
    "timers": {"throughput": dict},
    "autotuning": {
        **dict.fromkeys(("enabled", "fast", "overwrite"), bool),
        **dict.fromkeys(("results_dir", "exps_dir", "metric_path", "model_info_path"), str),
        **dict.fromkeys(("start_profile_step", "end_profile_step", "tuner_early_stopping", "tuner_num_trials", "mp_size"), int),
        **dict.fromkeys(("max_train_batch_size", "min_train_batch_size", "num_tuning_micro_batch_sizes"), int),
        **dict.fromkeys(("max_train_micro_batch_size_per_gpu", "min_train_micro_batch_size_per_gpu"), int),
        **dict.fromkeys(("arg_mappings", "model_info"), dict),
        "metric": ("latency", "throughput", "flops", "forward", "backward", "step"),
        "tuner_type": ("gridsearch", "random", "model_based"),
    },
}

# Sections that DeepSpeed checks with pydantic models of its own; see _section_models.
MODELLED_SECTIONS = ("zero_optimization", "bf16", "fp16", "comms_logger", "timers.throughput")

REFUSED: dict[str, str] = {
    "optimizer": "the recipe owns it: set optimizer.impl, lr, weight_decay, betas and eps there",
    "scheduler": "the recipe owns it: set schedule.* and optimizer.lr there",
    "amp": "DeepSpeed has removed it; enable bf16, or fp16 on a GPU",
    "activation_checkpointing": "set model.activation_checkpointing in the recipe; this section is for models that call DeepSpeed's own",
    "checkpoint": "train.checkpoint saves and resumes, and sets what it needs",
    "gradient_allreduce_op": "the head hands over gradients for a mean over ranks; a sum would scale them by world_size",
    "managed_gradient_accumulation": "the loop relies on the engine to find the accumulation boundary",
    "zero_allow_untested_optimizer": "every optimizer.impl of the recipe is one that ZeRO supports",
    "zero_force_ds_cpu_optimizer": "set for you when zero_optimization.offload_optimizer asks for it",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "the run reports through train.metrics: see metrics.* in the recipe"),
}

_NO_GUARD = "has no guard against NaN: one bad batch ruins the weights without a skipped step"
_ZERO_0 = {
    "fp32": _NO_GUARD,
    "bf16_autocast": _NO_GUARD,
    "bf16": "makes a hidden first step with empty gradients, so AdamW's step count is one ahead",
    "fp16": "unscales a loss that was never scaled, so gradients arrive 2^16 times too small",
}

_OTHER_OPTIMIZER = "makes DeepSpeed exchange ZeRO's optimizer for BF16_Optimizer, whose state cannot be saved here"
_NO_COMPILER = "needs an op that DeepSpeed compiles at start; this stack uses none"


@dataclass(frozen=True)
class DeepSpeedSummary:
    """What the JSON decided, for logs and metrics."""

    zero_stage: int  # 1, 2 or 3
    precision: str  # fp32, bf16, fp16 or bf16_autocast (float32 weights, bfloat16 matrix products)


def load_ds_config(
    path: Path, run: RunConfig, world_size: int, device_type: Literal["cpu", "cuda"]
) -> tuple[dict[str, Any], DeepSpeedSummary]:
    """Read one of ``ds_configs/*.json`` for this recipe, world size and device: :func:`complete_ds_config` of the file.

    Raises: ConfigError, also if the file is not JSON.
    """
    return complete_ds_config(read_json(Path(path)), run, world_size, device_type)


def complete_ds_config(
    document: Document, run: RunConfig, world_size: int, device_type: Literal["cpu", "cuda"]
) -> tuple[dict[str, Any], DeepSpeedSummary]:
    """Check DeepSpeed's JSON against this recipe, world size and device, and fill in what the recipe owns.

    Returns: the dict for ``deepspeed.initialize(config=...)``, complete, without any ``"auto"``; and its summary.
    Raises: ConfigError with one line per problem, naming key, reason, file and line. Combinations are looked at once every key by
    itself is good. Imports deepspeed (seconds) to check the sections with DeepSpeed's own models.
    """
    problems = [*_key_problems(document), *_auto_problems(document)]
    if problems:
        raise ConfigError(problems)
    sections, problems = _parse_sections(document)
    if problems:
        raise ConfigError(problems)
    summary, found = _judge(document.data, sections, run, device_type)
    owned = _owned_values(run, world_size)
    found += _contradictions(document.data, owned)
    found += _fixed_batches(document.data, run, world_size)
    if found:
        raise ConfigError(document.problem(key, message) for key, message in found)

    config = {**document.data, **{key: value for key, (value, _) in owned.items()}}
    # DeepSpeed's throughput timer synchronises the device twice per step; train.metrics measures without.
    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    if _offloads(sections["zero_optimization"].offload_optimizer):
        config["zero_force_ds_cpu_optimizer"] = False  # else DeepSpeed insists on its compiled DeepSpeedCPUAdam
    return config, summary


def _key_problems(document: Document) -> Iterator[str]:
    """Keys nobody knows, keys someone else owns, and values of the wrong type, wherever DeepSpeed does not look itself."""
    tops = {*OWNED_BY_RECIPE, *VALUES, *UNCHECKED_SECTIONS, *(name for name in MODELLED_SECTIONS if "." not in name)}
    for key, value in document.data.items():
        if key in REFUSED:
            yield document.problem((key,), f"refused: {REFUSED[key]}")
        elif key not in tops:
            hint = did_you_mean(key, tops)
            yield document.problem((key,), f"unknown or unsupported key (DeepSpeed may ignore it without a word){hint}")
        elif key in VALUES:
            yield from _type_problems(document, (key,), value, VALUES[key])
        elif key not in OWNED_BY_RECIPE and not isinstance(value, dict):
            yield document.problem((key,), f"must be an object of keys and values, got {show(value)}")
        for name, inner in value.items() if key in UNCHECKED_SECTIONS and isinstance(value, dict) else ():
            known = UNCHECKED_SECTIONS[key]
            if name in known:
                yield from _type_problems(document, (key, name), inner, known[name])
            else:
                yield document.problem((key, name), f"unknown or unsupported key{did_you_mean(name, known)}")


def _type_problems(document: Document, key: Key, value: Any, expected: type | tuple[str, ...]) -> Iterator[str]:
    if value == "auto":  # its own, better message: _auto_problems
        return
    if isinstance(expected, tuple):
        if value not in expected:
            yield document.problem(key, f"must be one of {', '.join(expected)}, got {show(value)}{did_you_mean(value, expected)}")
    elif type(value) is not expected:
        words = {bool: "true or false", int: "an integer", str: "text", list: "a list", dict: "an object"}
        yield document.problem(key, f"must be {words[expected]}, got {show(value)}")


def _auto_problems(document: Document) -> Iterator[str]:
    """DeepSpeed drops "auto" inside a section: ``"stage": "auto"`` would be stage 0."""

    def walk(value: Any, key: Key) -> Iterator[Key]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from walk(inner, (*key, name))
        elif value == "auto":
            yield key

    for key in walk(document.data, ()):
        if key[0] not in (*OWNED_BY_RECIPE, *REFUSED):
            yield document.problem(key, f'only {", ".join(OWNED_BY_RECIPE)} can be "auto"; leave it out for DeepSpeed\'s default')


def _section_models() -> dict[str, type[BaseModel]]:
    # Here, because importing deepspeed takes seconds and this module is also read by tools that need none of it.
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models = (DeepSpeedZeroConfig, DeepSpeedBF16Config, DeepSpeedFP16Config, CommsLoggerConfig, DeepSpeedThroughputTimerConfig)
    return dict(zip(MODELLED_SECTIONS, models, strict=True))


def _parse_sections(document: Document) -> tuple[dict[str, Any], list[str]]:
    """Every modelled section as DeepSpeed reads it (its defaults where absent), and the problems found."""
    parsed: dict[str, Any] = {}
    problems: list[str] = []
    for name, model in _section_models().items():
        key = tuple(name.split("."))
        section = document.data
        for part in key:
            section = section.get(part, {})
        for argument in {"self", "strict"} & set(section):  # parameters of DeepSpeed's base class: it would not call them unknown
            problems.append(document.problem((*key, argument), "unknown key"))
            return parsed, problems
        try:
            parsed[name] = model(**section)
        except ValidationError as error:
            problems += explain(error, model, document, key)
        except AssertionError as error:  # a deprecated key beside its replacement
            problems.append(document.problem(key, str(error)))
    return parsed, problems


def _judge(data: dict[str, Any], sections: dict[str, Any], run: RunConfig, device_type: str) -> tuple[DeepSpeedSummary, list[Problem]]:
    """The summary, and the reasons why this combination would train badly or not at all (measured, DeepSpeed 0.19.8)."""
    zero, bf16, fp16 = sections["zero_optimization"], sections["bf16"], sections["fp16"]
    autocast = data.get("torch_autocast", {})
    problems: list[Problem] = []

    def refuse(condition: object, key: str, reason: str) -> None:
        if condition:
            problems.append((tuple(key.split(".")), reason))

    refuse(bf16.enabled and fp16.enabled, "fp16.enabled", "bf16 is enabled too; choose one")
    refuse(fp16.enabled and device_type == "cpu", "fp16.enabled", "fp16 needs a GPU; on a CPU use a bf16 or fp32 config")
    refuse(fp16.fp16_master_weights_and_grads, "fp16.fp16_master_weights_and_grads", f"{_NO_COMPILER} (DeepSpeedCPUAdam)")
    refuse(not bf16.check_grad_overflow, "bf16.check_grad_overflow", "false removes the only guard against NaN; leave it true")
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        refuse(getattr(bf16, name), f"bf16.{name}", "updates smaller than bf16's 8 bits would be lost; keep the state in float32")

    if autocast.get("enabled"):
        dtype = autocast.get("dtype")
        refuse(bf16.enabled or fp16.enabled, "torch_autocast.enabled", "cannot be combined with bf16 or fp16; choose one")
        refuse(dtype is None, "torch_autocast.dtype", "required: without it a GPU would use float16, which is refused")
        refuse(
            dtype == "float16",
            "torch_autocast.dtype",
            "float16 is broken: its loss scale never drops, and clipping sees scaled gradients; use bfloat16, or the fp16 section",
        )
    precision = "fp16" if fp16.enabled else "bf16" if bf16.enabled else "bf16_autocast" if autocast.get("enabled") else "fp32"

    accumulate = data.get("data_types", {}).get("grad_accum_dtype")  # None: the precision of the weights
    mixed = accumulate not in (None, "fp32", precision)
    refuse(mixed, "data_types.grad_accum_dtype", f"must be fp32 or the precision ({precision}), got {accumulate}")
    other = precision == "bf16" and accumulate == "fp32" and zero.stage == 1 and not _offloads(zero.offload_optimizer)
    refuse(other, "data_types.grad_accum_dtype", f"fp32 with bf16 and ZeRO 1 {_OTHER_OPTIMIZER}; use stage 2 or 3")

    refuse(zero.stage == 0, "zero_optimization.stage", f"ZeRO 0 with {precision} {_ZERO_0[precision]}; use stage 1, 2 or 3")
    hooks = "3 gathers each layer's weights in a hook, where torch.compile breaks its graph: nothing fuses; use 1 or 2"
    refuse(zero.stage == 3 and run.model.compile, "zero_optimization.stage", f"{hooks}, or model.compile=false in the recipe")
    refuse(not zero.compute_grad_norm, "zero_optimization.compute_grad_norm", "false removes the guard against NaN and the clipping")
    for name in ("zenflow", "zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        refuse(getattr(zero, name), f"zero_optimization.{name}", _NO_COMPILER)

    offload = zero.offload_optimizer
    if _offloads(offload):
        key = "zero_optimization.offload_optimizer"
        impl = run.optimizer.impl
        refuse(impl != "torch", key, f"needs optimizer.impl: torch in the recipe; the one of {impl} runs on the GPU alone")
        refuse(offload.ratio < 1 or offload.super_offload, key, f"ratio below 1 and super_offload: {_NO_COMPILER} (DeepSpeedCPUAdam)")
    for name, section in (("offload_optimizer", offload), ("offload_param", zero.offload_param)):
        refuse(section and section.device == "nvme", f"zero_optimization.{name}.device", f"nvme {_NO_COMPILER} (async_io); use cpu")
    return DeepSpeedSummary(int(zero.stage), precision), problems


def _offloads(offload: Any) -> bool:
    return offload is not None and offload.device != "none"


def _owned_values(run: RunConfig, world_size: int) -> dict[str, tuple[float, str]]:
    """The keys of OWNED_BY_RECIPE, each with its value and the recipe's name for it."""
    key = "stages.0.batch" if run.stages[0].batch else "batch"
    batch = run.stage_batch(0)  # the engine is told of others when their stage begins
    accumulation, total = batch.accumulation(world_size, key), batch.images_per_step(world_size)
    product = f"{key}.micro_batch_size x grad_accum_steps x world_size = {batch.micro_batch_size} x {accumulation} x {world_size}"
    values = (
        (batch.micro_batch_size, f"{key}.micro_batch_size: {batch.micro_batch_size}"),
        (accumulation, f"{key}.grad_accum_steps: {accumulation}"),
        (total, f"{product} = {total}"),
        (run.optimizer.clip_grad_norm, f"optimizer.clip_grad_norm: {run.optimizer.clip_grad_norm}"),
    )
    return dict(zip(OWNED_BY_RECIPE, values, strict=True))


def _fixed_batches(data: dict[str, Any], run: RunConfig, world_size: int) -> Iterator[Problem]:
    """Numbers in the JSON where stages have several."""
    batches = [run.stage_batch(index) for index in range(len(run.stages))]
    each = {
        "train_micro_batch_size_per_gpu": [batch.micro_batch_size for batch in batches],
        "gradient_accumulation_steps": [batch.accumulation(world_size) for batch in batches],
        "train_batch_size": [batch.images_per_step(world_size) for batch in batches],
    }
    for key, values in each.items():
        if data.get(key, "auto") != "auto" and len(set(values)) > 1:
            yield (key,), f'{show(data[key])}, but the stages have {", ".join(map(str, values))}; write "auto"'


def _contradictions(data: dict[str, Any], owned: dict[str, tuple[float, str]]) -> list[Problem]:
    return [
        ((key,), f'{show(data[key])} contradicts {owner} in the recipe, which owns it; write "auto"')
        for key, (value, owner) in owned.items()
        if key in data and data[key] != "auto" and (isinstance(data[key], bool) or data[key] != value)
    ]
