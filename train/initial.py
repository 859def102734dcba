"""Where a run begins that does not begin at random: the backbone with the weights of a file (``model.init_from``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from eval.release_folder import sha256
from eval.weights import load_backbone
from model.vit import Vit
from train.config import ConfigError, ModelConfig, RunConfig
from train.dist import Ranks
from train.document import show
from train.engine_state import load_weights
from train.replicas import require_equal


@dataclass(frozen=True)
class Origin:
    """Which weights the backbone of a run began with. Kept in its checkpoints; equal files have equal digests, wherever they lie."""

    file: str  # that the weights were read from
    sha256: str  # of it

    def __str__(self) -> str:
        return f"{self.file} (SHA-256 {self.sha256[:16]})"


def read_initial_weights(model: ModelConfig) -> tuple[Vit, Origin]:
    """The weights of ``model.init_from``, float32 on the CPU.

    Raises: EvalError if nothing there can be opened as a backbone; ConfigError if it is another one than the recipe's.
    """
    loaded = load_backbone(model.init_from)
    found = {"name": loaded.preset, "embedding_size": loaded.net.embedding_size}
    differing = {key: value for key, value in found.items() if getattr(model, key) != value}
    if differing:
        raise ConfigError(
            f"model.{key}: expected {show(value)}, which {loaded.file} of model.init_from has, found {show(getattr(model, key))}; set "
            f"model.{key}={value}, or choose other weights"
            for key, value in differing.items()
        )
    return loaded.net, Origin(str(loaded.file), sha256(loaded.file))


def require_no_weights(cfg: RunConfig) -> None:
    """Raises: ConfigError if a new run of this recipe makes no sense with a random backbone. Not a check of the recipe by itself: which
    weights is often said on the command line, and ``train plan`` needs none."""
    first = cfg.stages[0]
    if first.freeze_backbone:
        key, what = "stages.0.freeze_backbone", f"stage {first.name} would fit the class centers to a random backbone; set it to false"
    elif cfg.head.init_centers == "class_means":
        key, what = "head.init_centers", "class_means of a random backbone say nothing of the classes; set it to random"
    else:
        return
    raise ConfigError(f"model.init_from: not given, but {key} needs weights: {what}, or give a run, a release or a file of weights")


def share_initial_weights(net: Vit | None, engine, ranks: Ranks) -> None:
    """Give a new engine the weights and BatchNorm statistics of rank 0's ``net``, the same on every rank.

    Not to the module before DeepSpeed takes it: its float32 masters would be copies of what it has rounded. Raises: RankError on every
    rank if not all have got the same. Collectives: a broadcast of every tensor, a gather of their checksums, and one of the weights.
    """
    shapes = {name: (getattr(tensor, "ds_shape", tensor.shape), torch.float32) for name, tensor in engine.module.named_parameters()}
    shapes |= {name: (buffer.shape, buffer.dtype) for name, buffer in engine.module.named_buffers()}
    given = net.state_dict() if net else {}
    weights = {}
    for name, (shape, dtype) in shapes.items():
        tensor = given[name].to(ranks.device, dtype) if net else torch.empty(shape, dtype=dtype, device=ranks.device)
        dist.broadcast(tensor, 0, group=ranks.group)
        weights[name] = tensor.cpu()
    require_equal(0, weights, ranks)
    load_weights(engine, weights)
