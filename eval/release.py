"""Weights as others get them: a folder of safetensors, JSON and a model card. ``write_release`` makes it, ``load_release`` opens it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.output import new_folder, write_file
from eval.align import TEMPLATE
from eval.embedder import Embedder, backbone_embedder
from eval.errors import EvalError
from eval.release_card import ReleaseFacts, card
from eval.release_folder import CARD, CHECKSUMS, CONFIG, OWNED, PREPROCESSING, checksum_lines, is_release
from eval.weights import Backbone, load_backbone
from model.vit import IMAGE_SIZE, PRESETS
from train.checkpoint_folder import BACKBONE

FORMAT = 1


@dataclass(frozen=True)
class Release:
    """An opened release."""

    folder: Path
    config: dict[str, Any]  # config.json
    preprocessing: dict[str, Any]  # preprocessing.json
    embedder: Embedder

    def embed(self, images: np.ndarray | Tensor) -> np.ndarray:
        """Aligned faces, uint8 [n, 112, 112, 3] RGB, to float32 [n, D], not normalised. Raises: EvalError for images of another kind."""
        return self.embedder(images)


def load_release(folder: str | Path, batch_size: int = 64) -> Release:
    """Open a release; every file of it is compared with its checksum first.

    Args:
        batch_size: most images per forward.
    Raises: EvalError that names the file which is missing, damaged, or not of this version.
    """
    folder = Path(folder)
    if not is_release(folder):
        raise EvalError(f"{folder}: no release: expected a folder that holds {BACKBONE}, {CONFIG}, {PREPROCESSING}, {CARD} and {CHECKSUMS}")
    backbone = load_backbone(folder)  # checks all files
    config, preprocessing = _read_json(folder / CONFIG), _read_json(folder / PREPROCESSING)
    for path, found, expected in (
        (folder / CONFIG, config, {"format": FORMAT, **_network(backbone)}),
        (folder / PREPROCESSING, preprocessing, preprocessing_facts()),
    ):
        other = [key for key, value in expected.items() if found.get(key) != value]
        if other:
            raise EvalError(
                f"{path}: {other[0]}: expected {expected[other[0]]}, found {found.get(other[0])!r:.80}; use the version that wrote it"
            )
    return Release(folder, config, preprocessing, backbone_embedder(backbone, batch_size))


def write_release(backbone: Backbone, out: Path, facts: ReleaseFacts, *, force: bool = False) -> None:
    """Write the folder ``out``, which appears when it is complete; with ``force`` it replaces an older release.

    From a checkpoint of a run ``backbone.safetensors`` comes out byte for byte as it is there.
    Raises: DataError when ``out`` exists otherwise; OSError.
    """
    config = {
        "format": FORMAT,
        "name": facts.name,
        **_network(backbone),
        "parameters": sum(each.numel() for each in backbone.net.parameters()),
        "dtype": "float32",
        "weights": facts.weights,
        "step": facts.step,
        "data": {"images": facts.images, "identities": facts.identities},
        "licence": facts.licence,
    }
    with new_folder(out, OWNED, force=force) as folder:
        state = {key: value.contiguous() for key, value in backbone.net.state_dict().items()}
        write_file(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        save_file(state, folder / BACKBONE, metadata={"preset": backbone.preset})
        shutil.copymode(folder / CONFIG, folder / BACKBONE)  # safetensors makes files that only their owner reads
        write_file(folder / PREPROCESSING, json.dumps(preprocessing_facts(), indent=2) + "\n")
        write_file(folder / CARD, card(config, facts, folder))
        write_file(folder / CHECKSUMS, checksum_lines(folder))


def preprocessing_facts() -> dict[str, Any]:
    """What the network takes, for people and for other programs."""
    return {
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "color": "RGB",
        "layout": "NCHW",
        "formula": "(x / 255 - 0.5) / 0.5",
        "source_range": "0..255",
        "input_range": "-1..1",
        "alignment": {
            "transform": "similarity, least squares",
            "landmarks": ["left eye", "right eye", "tip of the nose", "left corner of the mouth", "right corner of the mouth"],
            "sides": "as seen in the picture",
            "template": TEMPLATE.tolist(),
            "unit": "pixels (x, y)",
        },
        "mirror": "the field's protocols sum the embeddings of an image and of its mirror; the network itself does not",
    }


def _network(backbone: Backbone) -> dict[str, Any]:
    preset = {key: value for key, value in asdict(PRESETS[backbone.preset]).items() if key != "drop_path"}  # that is of training
    return {"preset": backbone.preset, "embedding_size": backbone.net.embedding_size, "network": preset}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvalError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise EvalError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
