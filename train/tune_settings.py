"""What ``train tune`` varies: the settings of a trial, as DeepSpeed's JSON and as overrides of the recipe, and why some are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train.autotuning import read_ds_config
from train.config import BatchConfig, ConfigError, RunConfig, load_run_config
from train.document import Document, read_json
from train.ds_config import OWNED_BY_RECIPE, DeepSpeedSummary, complete_ds_config

ON_OFF = {True: "on", False: "off"}
PRECISIONS = ("bf16", "fp16", "fp32", "bf16_autocast")
_SHIPPED = Path(__file__).resolve().parents[1] / "ds_configs"
_PRECISION_SECTIONS = ("bf16", "fp16", "torch_autocast")


@dataclass(frozen=True)
class Settings:
    """One combination."""

    micro_batch_size: int  # images per rank and forward pass
    zero_stage: int
    precision: str  # one of PRECISIONS
    checkpointing: bool  # model.activation_checkpointing
    overlap: bool  # zero_optimization.overlap_comm

    def __str__(self) -> str:
        return (
            f"micro-batch {self.micro_batch_size}, ZeRO {self.zero_stage}, {self.precision}, "
            f"checkpointing {ON_OFF[self.checkpointing]}, overlap {ON_OFF[self.overlap]}"
        )


@dataclass(frozen=True)
class Workload:
    """What every trial trains: one stage of a recipe on a number of ranks, at the recipe's global batch."""

    recipe: Path
    overrides: tuple[str, ...]  # the user's, and those that name the data
    cfg: RunConfig  # of both
    deepspeed: Document  # the JSON that the settings are changes of
    given: DeepSpeedSummary  # of that JSON
    stage: int  # index of the measured one
    world_size: int
    device_type: Literal["cpu", "cuda"]
    window_steps: int  # optimizer steps
    windows: int  # that count; one before them does not

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step, of the recipe as it is. Raises ConfigError if the ranks cannot share it."""
        return self.cfg.stage_batch(self.stage).images_per_step(self.world_size)

    def grad_accum_steps(self, settings: Settings) -> int:
        """What keeps the global batch. Raises: ConfigError if nothing does."""
        batch = BatchConfig(micro_batch_size=settings.micro_batch_size, global_batch_size=self.global_batch_size)
        return batch.accumulation(self.world_size, self._batch_key)

    @property
    def _batch_key(self) -> str:
        return f"stages.{self.stage}.batch" if self.cfg.stages[self.stage].batch else "batch"

    def changes(self, settings: Settings) -> list[str]:
        """The settings as overrides of the recipe, to be pasted; on this number of ranks its global batch stays."""
        fixed = self.cfg.stage_batch(self.stage).global_batch_size is not None  # then the accumulation follows by itself
        return [
            f"{self._batch_key}.micro_batch_size={settings.micro_batch_size}",
            *([] if fixed else [f"{self._batch_key}.grad_accum_steps={self.grad_accum_steps(settings)}"]),
            f"model.activation_checkpointing={json.dumps(settings.checkpointing)}",
        ]

    def trial_overrides(self, settings: Settings, output: Path) -> list[str]:
        """Overrides that make a trial of the recipe: one short stage, and nothing but training beside the checkpoint at its end."""
        late = self.device_type == "cuda"  # the timer tells of a window when the next one has passed
        steps = self.window_steps * (1 + self.windows + late)
        stage = self.cfg.stages[self.stage].model_dump(mode="json")
        stage |= {"epochs": None, "steps": steps, "until": None, "batch": None, "schedule": None}
        stage["freeze_backbone"] = False  # a trial begins at random; what a trained backbone needs is enough for a frozen one
        batch = {"micro_batch_size": settings.micro_batch_size, "global_batch_size": self.global_batch_size}
        return [
            *self.overrides,
            *("epochs=null", "eval=null", "resume=never", "checkpoint={}", "schedule.warmup_epochs=0", "schedule.warmup_steps=null"),
            *("model.init_from=null", "head.init_centers=random"),
            *("metrics.port=0", f"metrics.log_every={self.window_steps}"),
            f"stages={json.dumps([stage])}",
            f"batch={json.dumps(batch)}",
            f"model.activation_checkpointing={json.dumps(settings.checkpointing)}",
            f"output={output}",
        ]

    def deepspeed_config(self, settings: Settings) -> dict[str, Any]:
        """DeepSpeed's JSON with these settings.

        What the user's says of neither stage nor precision stays. Of its ``zero_optimization`` that is what differs from the file of
        ``ds_configs`` for its own stage and precision; the rest is taken from the file for these ones.
        """
        base = self.deepspeed.data
        shipped, shipped_for_given = (_shipped(of.zero_stage, of.precision) for of in (settings, self.given))
        source = base if settings.precision == self.given.precision else shipped
        usual = shipped_for_given["zero_optimization"]
        own = {key: value for key, value in base.get("zero_optimization", {}).items() if usual.get(key) != value}
        own = {key: value for key, value in own.items() if settings.zero_stage == 3 or not key.startswith("stage3_")}
        return {
            **dict.fromkeys(OWNED_BY_RECIPE, "auto"),
            **{key: value for key, value in base.items() if key not in (*OWNED_BY_RECIPE, *_PRECISION_SECTIONS)},
            **{key: source[key] for key in _PRECISION_SECTIONS if key in source},
            "zero_optimization": {**shipped["zero_optimization"], **own, "stage": settings.zero_stage, "overlap_comm": settings.overlap},
        }

    def refusal(self, settings: Settings) -> str | None:
        """Why these settings would be refused before training; None if they would not."""
        try:
            cfg = load_run_config(self.recipe, self.trial_overrides(settings, Path("trial")))
            document = Document("the JSON of this trial", self.deepspeed_config(settings))
            complete_ds_config(document, cfg, self.world_size, self.device_type)
        except ConfigError as error:
            return "; ".join(error.problems)
        return None


def _shipped(zero_stage: int, precision: str) -> dict[str, Any]:
    """The JSON of ``ds_configs``; of stage 0 and of autocast, for which there is none, the nearest."""
    if precision == "bf16_autocast":
        return {**_shipped(zero_stage, "fp32"), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    return read_json(_SHIPPED / f"zero{max(zero_stage, 1)}_{precision}.json").data


def open_workload(
    recipe: Path,
    overrides: Sequence[str],
    deepspeed_config: Path,
    stage_name: str | None,
    world_size: int,
    device_type: Literal["cpu", "cuda"],
    window_steps: int,
    windows: int,
) -> Workload:
    """Read recipe and JSON. ``stage_name``: None for the last stage. Raises: ConfigError."""
    cfg = load_run_config(recipe, overrides)
    names = [stage.name for stage in cfg.stages]
    if stage_name is not None and stage_name not in names:
        raise ConfigError(f"--stage: no such stage in {recipe}: {stage_name}; it has {', '.join(names)}")
    document, _ = read_ds_config(str(deepspeed_config))  # refuses autotuning.enabled, which would end every trial
    _, summary = complete_ds_config(document, cfg, world_size, device_type)
    stage = len(names) - 1 if stage_name is None else names.index(stage_name)
    return Workload(recipe, tuple(overrides), cfg, document, summary, stage, world_size, device_type, window_steps, windows)
