"""What a release tells about its weights: facts of the run and of measurements, and the model card that is made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from eval.errors import EvalError
from eval.release_folder import CONFIG, PREPROCESSING, sha256
from eval.results import Entry, read_results
from eval.weights import Backbone, refuse_outside
from train.checkpoint_folder import BACKBONE, MANIFEST, CheckpointError, read_manifest
from train.document import ConfigError, read_yaml, write_yaml
from train.redact import redact

RECIPE = "recipe.yaml"  # of a run, as resolved
TEMPLATE = Path(__file__).with_name("release_card.md")


@dataclass(frozen=True)
class ReleaseFacts:
    """What is not in the weights themselves; None: not known."""

    name: str
    licence: str | None = None
    weights: str = "last"  # or "mean": the exponential mean over steps
    step: int | None = None  # optimizer steps of the run
    images: int | None = None  # of the training set
    identities: int | None = None
    recipe: str | None = None  # YAML, without secrets and folders
    results: list[Entry] = field(default_factory=list)  # of measurements on these weights


def run_facts(run: Path, backbone: Backbone) -> dict[str, Any]:
    """The facts that a run directory holds, by their names in ``ReleaseFacts``; the weights are compared with the checkpoint's manifest.

    Raises: EvalError for damaged weights, a damaged manifest or recipe.
    """
    facts: dict[str, Any] = {"weights": "last" if backbone.file.name == BACKBONE else "mean"}
    checkpoint, recipe = backbone.file.parent, run / RECIPE
    if (checkpoint / MANIFEST).exists():
        refuse_outside(checkpoint / MANIFEST, run)
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError as error:
            raise EvalError(f"{checkpoint}: {error}") from error
        entry = manifest["files"].get(backbone.file.name)
        if entry is None or entry["sha256"] != sha256(backbone.file):
            raise EvalError(f"{backbone.file}: damaged or changed, its SHA-256 is not the one in {MANIFEST}; copy the checkpoint again")
        data = manifest.get("data", {}).get("fingerprint", {})
        facts |= {"step": manifest["step"], "images": data.get("num_images"), "identities": data.get("num_classes")}
    if recipe.exists():
        refuse_outside(recipe, run)
        try:
            facts["recipe"] = write_yaml(_without_folders(redact(read_yaml(recipe).data)))
        except ConfigError as error:
            raise EvalError(str(error)) from error
    return facts


def results_of(paths: list[Path], digest: str | None) -> list[Entry]:
    """Results that ``--json`` of the commands of ``eval`` wrote.

    Args:
        digest: ``Embedder.digest`` of the weights that are released.
    Raises: EvalError for a file that is no result, or one of another model.
    """
    entries = read_results(paths)
    for entry in entries:
        found = entry.result.model_sha256
        if found != digest:
            raise EvalError(
                f"{entry.file}: a result of another model ({entry.result.model}, model_sha256 {str(found)[:12]}), expected "
                f"{str(digest)[:12]}; measure the weights that are released"
            )
    return entries


def card(config: dict[str, Any], facts: ReleaseFacts, folder: Path) -> str:
    """The model card, in Markdown. ``config``: of config.json; ``folder``: holds the files whose checksums it tells."""
    from eval.report import sections  # here, because it brings matplotlib

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        config=config,
        facts=facts,
        sections=sections(facts.results),
        checksums={name: sha256(folder / name) for name in (BACKBONE, CONFIG, PREPROCESSING)},
    )


def _without_folders(value: Any) -> Any:
    """A JSON value in which of every absolute path the last part is left: how a machine is laid out is nobody else's business."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
