"""DeepSpeed's own autotuner, ``deepspeed --autotuning``: how its experiments reach this entry point.

It starts the command line that it was given, with the path after ``--deepspeed_config`` replaced by a whole JSON, base64-encoded. The batch
in that JSON is the experiment's, not the recipe's, and the engine ends the process once it has measured.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from train.config import RunConfig, validate
from train.document import ConfigError, Document, parse_json, read_json

SECTION = "autotuning"
_SMALLEST = 2  # images: the profile of the model asks for 1, which BatchNorm cannot train on


def read_ds_config(text: str) -> tuple[Document, bool]:
    """What ``--deepspeed_config`` says: a path, or JSON in base64; and whether it is an experiment of the autotuner.

    Raises: ConfigError if it is neither, or if a file has ``autotuning`` switched on: the engine would end the run after a few steps.
    """
    path = Path(text)
    decoded = None if path.suffix == ".json" else _decoded(text)
    if decoded is None:
        document = read_json(path)
        if _enabled(document):
            raise ConfigError(
                document.problem((SECTION, "enabled"), "true ends a run after a few steps; start `deepspeed --autotuning`, or write false")
            )
        return document, False
    document = parse_json(decoded, "--deepspeed_config, JSON in base64")
    return document, _enabled(document)


def with_batch_of(experiment: Document, cfg: RunConfig) -> tuple[Document, RunConfig]:
    """JSON and recipe of an experiment, which has one batch for all stages.

    The recipe takes micro-batch and accumulation from the JSON, where numbers stand there. It trains the backbone from the first step on,
    because only steps of the engine are measured, and begins at random. Raises: ConfigError.
    """
    data: dict[str, Any] = dict(experiment.data)
    micro_batch_size, accumulation = (data.get(key, "auto") for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))
    recipe = Document("recipe of the experiment", cfg.model_dump(mode="json"))
    for index, stage in enumerate(cfg.stages):
        if stage.batch:
            recipe.override(f"stages.{index}.batch=null")
        recipe.override(f"stages.{index}.freeze_backbone=false")
    for override in ("model.init_from=null", "head.init_centers=random"):
        recipe.override(override)
    if micro_batch_size != "auto":
        if _profiles(data) and micro_batch_size == 1:
            data["train_micro_batch_size_per_gpu"] = micro_batch_size = _SMALLEST
        recipe.override(f"batch.micro_batch_size={micro_batch_size}")
        recipe.override("batch.global_batch_size=null")
        recipe.override(f"batch.grad_accum_steps={'null' if accumulation == 'auto' else accumulation}")
    return Document(experiment.name, data, experiment.places), validate(recipe)


def _decoded(text: str) -> str | None:
    """The text in urlsafe base64; None if it is no such thing."""
    try:
        return base64.b64decode(text, altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None


def _enabled(document: Document) -> bool:
    section = document.data.get(SECTION)
    return isinstance(section, dict) and section.get("enabled") is True


def _profiles(data: dict[str, Any]) -> bool:
    """Whether the experiment is the first one, which asks for the number of parameters and the memory of activations."""
    info = data[SECTION].get("model_info")
    return isinstance(info, dict) and info.get("profile") is True
