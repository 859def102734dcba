"""``python -m train plan``: what a recipe comes to on a number of ranks, and what changes against the number that it was written for.

Needs no GPU and no process group, and no data where the recipe says ``data.num_images`` and ``data.num_classes``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data_pipeline.shard_set import open_set
from train.accelerators import ACCELERATORS
from train.budget import describe_budget, describe_fits, fit_all, gpu_named, plan_budget
from train.comparison import compare, describe_comparison, recipe_warnings, written_for
from train.config import DataConfig, RunConfig, load_run_config
from train.dist import import_deepspeed, read_ranks
from train.ds_config import load_ds_config
from train.redact import redact
from train.run_plan import describe, plan_run

_ERROR = 2
_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
_NO_CLASSES = "No memory: it depends on data.num_classes, which the recipe leaves to the data."


def count_classes(data: DataConfig) -> int:
    """The identities: what the recipe says, or else what its records hold. Raises: DataError if these cannot be opened."""
    if data.num_classes is not None:
        return data.num_classes
    return int((open_set(data.path).images_per_class >= data.min_images_per_identity).sum())


def count_images(data: DataConfig) -> int:
    """The images of an epoch: what the recipe says, or else what its records hold. Raises: DataError if these cannot be opened."""
    if data.num_images is not None:
        return data.num_images
    per_class = open_set(data.path).images_per_class
    return int(per_class[per_class >= data.min_images_per_identity].sum())


def main(argv: Sequence[str]) -> int:
    """Print the plan. Exit codes: 0 done, 2 something given is wrong (on stderr, one line per problem)."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        cfg = load_run_config(arguments.config, arguments.overrides)
        import_deepspeed(read_ranks().device)
        if arguments.all:
            _all_configs(arguments, cfg)
        else:
            _one_config(arguments, cfg)
    except (ValueError, OSError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return _ERROR
    return 0


def _all_configs(arguments: argparse.Namespace, cfg: RunConfig) -> None:
    """``--all``: which of ds_configs/ fits which card."""
    fits = fit_all(cfg, sorted(_CONFIGS.glob("*.json")), count_classes(cfg.data), arguments.world_size)
    _write_json(arguments.json, {"model": cfg.model.name, "world_size": arguments.world_size, "fits": [asdict(fit) for fit in fits]})
    print(f"{arguments.config} on {arguments.world_size} ranks: {cfg.model.name}\n")
    sizes = dict.fromkeys(str(cfg.stage_batch(index).micro_batch_size) for index in range(len(cfg.stages)))
    print(describe_fits(fits, " and ".join(sizes)))


def _one_config(arguments: argparse.Namespace, cfg: RunConfig) -> None:
    """Without ``--all``: steps, learning rate, memory and speed."""
    if arguments.deepspeed_config is None:
        raise ValueError("--deepspeed_config: expected one of ds_configs/*.json, found nothing; or --all for a table over all of them")
    config, deepspeed = load_ds_config(arguments.deepspeed_config, cfg, arguments.world_size, "cuda")
    gpu = arguments.gpu and gpu_named(arguments.gpu)
    num_images = count_images(cfg.data)
    plan = plan_run(cfg, num_images, arguments.world_size)
    reference = arguments.reference or written_for(cfg)
    compared = reference not in (None, plan.world_size)
    comparison = compare(cfg, num_images, plan.world_size, reference) if compared else None
    network = arguments.network * 1e9 / 8
    budget = None  # a recipe may say its images and not its classes, and the data may not be there yet
    if cfg.data.num_classes or not cfg.data.num_images or gpu or cfg.data.path.exists():
        budget = plan_budget(cfg, config, deepspeed.precision, count_classes(cfg.data), arguments.world_size, plan, gpu, network)
    numbers = budget and budget.as_json()
    said = {"zero_stage": deepspeed.zero_stage, "precision": deepspeed.precision, "model": cfg.model.name}
    _write_json(arguments.json, {**said, **asdict(plan), "comparison": comparison and asdict(comparison), "budget": numbers})
    print(f"{arguments.config} on {plan.world_size} ranks: {cfg.model.name}, ZeRO {deepspeed.zero_stage}, {deepspeed.precision}\n")
    print(describe(plan))
    for text in recipe_warnings(plan, comparison and comparison.reference):
        print(f"warning: {text}")
    print(f"\n{describe_budget(budget, network) if budget else _NO_CLASSES}")
    if comparison:
        print(f"\nAgainst the {reference} ranks that the recipe was written for:\n\n{describe_comparison(comparison)}")
    elif reference:
        print("\nThis is the number of ranks that the recipe was written for.")
    else:
        print("\nNo comparison: the recipe does not fix its global batch; --reference N says how many ranks it was written for.")


def _write_json(path: Path | None, content: dict) -> None:
    if path:
        path.write_text(json.dumps(content, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "train plan",
        description="What a recipe comes to on a number of ranks: batches, steps, learning rate; memory of a rank; with --gpu an estimate "
        "of speed; and what changes against the number of ranks that it was written for. Needs no GPU, and no data where the recipe says "
        "data.num_images and data.num_classes.",
    )

    def ranks(text: str) -> int:
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
        return number

    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML), see train/recipes/")
    parser.add_argument(
        "--deepspeed_config", type=Path, help="DeepSpeed's JSON, see ds_configs/README.md; checked for a GPU. Needed unless --all is given"
    )
    parser.add_argument("--world-size", type=ranks, required=True, metavar="N", help="ranks, one per GPU")
    parser.add_argument(
        "--reference", type=ranks, metavar="N",
        help="ranks that the recipe was written for (default: those that take its batch.global_batch_size without accumulation)",
    )  # fmt: skip
    parser.add_argument(
        "--all", action="store_true", help="instead: which of ds_configs/*.json fits a GPU of 80, 40 and 24 GiB, up to which batch"
    )
    parser.add_argument("--gpu", metavar="NAME", help=f"estimate speed on it, and warn if it is too small: {', '.join(ACCELERATORS)}")
    parser.add_argument(
        "--network", type=float, default=400.0, metavar="GBIT", help="Gbit/s between nodes for each GPU (default: %(default)g)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there as well")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, e.g. batch.micro_batch_size=192")
    return parser
