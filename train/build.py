"""Build a run: everything checked on every rank before the first collective that could hang, everything restored before the first step."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data_pipeline.augment import Augment
from data_pipeline.graph import Decode
from data_pipeline.loader import FaceLoader
from model.partial_fc import PartialFC
from model.vit import Vit, build_vit
from train.checkpoint import Checkpoints, Identity, Layout, Saved
from train.checkpoint_folder import CheckpointError, Retention
from train.config import RunConfig
from train.dist import RankError, Ranks
from train.ds_config import DeepSpeedSummary
from train.ema import BackboneEma
from train.engine import build_engine, build_optimizer, require_compiler
from train.evaluation import PairVerification
from train.guard import Guard
from train.initial import Origin, read_initial_weights, require_no_weights, share_initial_weights
from train.initial_centers import set_class_means
from train.live import LogLines, open_progress
from train.lock import OutputLock
from train.metrics import LOG, BuildInfo, Metrics
from train.random_state import seed_rank
from train.report import announce
from train.run import Run, head_margin
from train.stages import StageManager, plan_stages
from train.stop import Flags, StopRequests
from train.tensorboard import TensorBoard, require_tensorboard
from train.timing import PartTimer, RunTime, time_collectives
from train.watchdog import Watchdog
from train.window import live_values, peak_flops

# Sections of DeepSpeed's JSON that change numbers, beyond ZeRO stage and precision.
_NUMERIC_SECTIONS = ("communication_data_type", "data_types", "torch_autocast", "bf16", "fp16")


def build_run(cfg: RunConfig, ds_config: dict, summary: DeepSpeedSummary, ranks: Ranks, stop: StopRequests, watchdog: Watchdog) -> Run:
    """Build the run, resumed from its newest complete checkpoint if the recipe says so.

    Raises RankError on every rank if anything given is wrong on any. Collectives: those of the engine's start and of the checkpoint's load.
    """

    lock = ranks.together(lambda: OutputLock(cfg.output, ranks.say) if ranks.is_first else None)
    if cfg.model.compile:
        ranks.together(lambda: require_compiler(ranks.device))
    if cfg.metrics.tensorboard:
        ranks.together(lambda: require_tensorboard() if ranks.is_first else None)
    verification = PairVerification(cfg.eval, ranks, watchdog.beat) if cfg.eval else None
    checkpoints = _open_checkpoints(cfg, ds_config, summary, ranks)
    newest = checkpoints.newest()
    saved = ranks.together(lambda: _read_checkpoint(cfg, checkpoints, newest))
    if saved:
        ranks.say(f"resuming from {newest}: step {saved.step}, stage {saved.run_state['stage']}")
    if saved and saved.moved:
        ranks.say(f"its layout is {saved.moved}: the run goes on with the same images, but not bit for bit")
    batches = ranks.together(lambda: _open_data_at(cfg, ranks, saved) if saved else _open_data(cfg, ranks, 0))
    _check_agreement(ranks, cfg, ds_config, batches)
    net, origin = _read_initial(cfg, saved, ranks)
    stages = ranks.together(lambda: _plan_stages(cfg, batches, ranks, saved))
    build, timer, run_time = BuildInfo(ranks.world_size, summary.zero_stage, summary.precision), PartTimer(ranks.device.type), RunTime()
    live = partial(live_values, watchdog, run_time, verification)
    metrics = ranks.together(lambda: Metrics(cfg.output / LOG, cfg.metrics, ranks.rank, ranks.local_rank, build, live))
    logged = ranks.broadcast(metrics.last) or {}

    torch.manual_seed(cfg.seed)  # the same weights on every rank
    backbone = build_vit(
        cfg.model.name,
        mask_ratio=cfg.model.mask_ratio,
        drop_path=cfg.model.drop_path,
        embedding_size=cfg.model.embedding_size,
        activation_checkpointing=cfg.model.activation_checkpointing,
    )
    optimizer = ranks.together(lambda: build_optimizer(backbone, cfg.optimizer))
    engine = build_engine(backbone, optimizer, ds_config, compiled=cfg.model.compile)
    if origin and not saved:
        share_initial_weights(net, engine, ranks)
        ranks.say(f"the backbone begins with {origin}")
        del net
    time_collectives(timer)
    decay = cfg.model.ema_decay
    ema = ranks.together(lambda: BackboneEma(engine, decay) if decay is not None else None)
    margin, curricular = head_margin(cfg.stage_margin(0))
    head = PartialFC(
        cfg.model.embedding_size,
        batches.num_classes,
        cfg.stages[0].sample_rate,
        margin,
        scale=cfg.head.scale,
        margin_gradient=cfg.head.margin_gradient,
        curricular=curricular,
        loss=cfg.head.loss,
        interclass_filter=cfg.head.interclass_filter,
        product_dtype=_product_dtype(cfg.head.product_dtype, summary.precision, ranks.device),
        chunk_rows=cfg.head.chunk_rows,
        group=ranks.group,
        seed=cfg.seed,
        optimizer=cfg.head.optimizer,
        betas=cfg.optimizer.betas,
        eps=cfg.optimizer.eps,
        device=ranks.device,
        waiting=partial(timer.part, "comm"),
    )
    if cfg.head.init_centers == "class_means" and not saved:
        set_class_means(cfg, ranks, engine, head, alive=watchdog.beat)
    # From here on every rank draws its own dropped patches and paths.
    seed_rank(cfg.seed, ranks.rank)
    guard = Guard(cfg.guard, ranks, cfg.output, summary.precision)
    opening = partial(_open_data, cfg, ranks)
    flags = Flags(ranks)
    progress = open_progress(cfg.metrics.live, str(cfg.output), ranks.say, sys.stdout) if ranks.is_first else LogLines(ranks.say)
    wanted, taken = cfg.metrics.tensorboard and ranks.is_first, saved.step if saved else 0
    tensorboard = ranks.together(lambda: TensorBoard(cfg.output / "tensorboard", taken, ranks.say) if wanted else None)
    parts = (guard, stages, checkpoints, metrics, timer, run_time, watchdog, verification, lock, stop, flags, progress, tensorboard)
    run = Run(cfg, ranks, batches, opening, engine, ema, head, *parts)
    run.origin, run.peak_flops = origin, peak_flops(cfg, summary.precision, ranks.device)
    if saved:
        run.resume(saved)
        run.restarts, run.furthest = logged.get("restarts", 0) + 1, logged.get("furthest_step", saved.step)
    run.require_space()
    announce(run, ds_config, summary)
    return run


def _open_checkpoints(cfg: RunConfig, ds_config: dict, summary: DeepSpeedSummary, ranks: Ranks) -> Checkpoints:
    """Collectives: those of Checkpoints."""
    batches = [cfg.stage_batch(index) for index in range(len(cfg.stages))]
    recipe, chosen = cfg.mathematics(), cfg.mathematics(defaults=False)
    for tree in (recipe, chosen):
        tree.pop("batch", None)
        for stage, batch in zip(tree["stages"], batches, strict=True):
            stage["batch"] = {"images": batch.images_per_step(ranks.world_size)}  # how ranks share them is their layout
    numerics = {key: ds_config[key] for key in _NUMERIC_SECTIONS if key in ds_config}
    identity = Identity(summary.precision, recipe, numerics, chosen)
    layout = Layout(ranks.world_size, summary.zero_stage, [batch.micro_batch_size for batch in batches])
    keep = cfg.checkpoint
    retention = Retention(keep.keep_last, keep.keep_every_steps, keep.keep_best)
    return Checkpoints(cfg.output / "checkpoints", ranks, identity, layout, retention, cfg.model.name)


def _product_dtype(choice: str, precision: str, device: torch.device) -> torch.dtype:
    """Of the head's operands; see HeadConfig. ``precision``: DeepSpeed's."""
    if choice == "auto":
        choice = "bfloat16" if device.type == "cuda" and precision != "fp32" else "float32"
    return getattr(torch, choice)


def _check_agreement(ranks: Ranks, cfg: RunConfig, ds_config: dict, batches: FaceLoader) -> None:
    """Nodes may hold stale copies of a file. Raises RankError. Collectives: one gather."""
    mine = {"recipe": cfg.shared_values(), "deepspeed": ds_config, "data set": batches.fingerprint["set"]}
    views = ranks.gather({name: json.dumps(value, sort_keys=True) for name, value in mine.items()})
    for name in mine:
        strangers = [rank for rank, view in enumerate(views) if view[name] != views[0][name]]
        if strangers:
            raise RankError(f"the {name} of ranks {strangers} is not that of rank 0: make the files equal on all nodes")


def _read_checkpoint(cfg: RunConfig, checkpoints: Checkpoints, newest: Path | None) -> Saved | None:
    if cfg.resume == "never":
        if newest is not None:
            raise CheckpointError(f"{newest}: this output has a checkpoint, and resume=never; choose another output, or resume=auto")
        return None
    if newest is None:
        if cfg.resume in ("required", "branch"):
            raise CheckpointError(
                f"{checkpoints.folder}: no checkpoint to resume from, and resume={cfg.resume}; check output, or set resume=auto"
            )
        return None
    return checkpoints.read(newest, branch=cfg.resume == "branch")


def _read_initial(cfg: RunConfig, saved: Saved | None, ranks: Ranks) -> tuple[Vit | None, Origin | None]:
    """The weights that a new run begins with, on rank 0, and on every rank what they are, or were; None and None: random ones.

    Raises RankError; also where class centers would be fitted to a random backbone. Collectives: a gather and a broadcast, where a new run
    begins with weights.
    """
    given = cfg.model.init_from
    if saved:
        origin = saved.run_state.get("origin")  # there is none in checkpoints from before model.init_from
        origin = origin and Origin(**origin)
        if given or origin:
            ranks.say(f"the run began with {origin or 'random weights'}; it goes on from its checkpoint, and model.init_from is not read")
        return None, origin
    if given is None:
        ranks.together(lambda: require_no_weights(cfg))
        return None, None
    net, origin = ranks.together(lambda: read_initial_weights(cfg.model) if ranks.is_first else None) or (None, None)
    return net, ranks.broadcast(origin)


def _plan_stages(cfg: RunConfig, batches: FaceLoader, ranks: Ranks, saved: Saved | None) -> StageManager:
    stages = StageManager(*plan_stages(cfg, batches.num_images, ranks.world_size))
    if saved:
        stages.load_state(saved.run_state["stages"], saved.step)
    return stages


def _open_data_at(cfg: RunConfig, ranks: Ranks, saved: Saved) -> FaceLoader:
    """The data from a checkpoint on, as the stage of its last step read them."""
    stages = saved.run_state["stages"]
    stage = stages["index"] - (saved.step == stages["start"] > 0)
    return _open_data(cfg, ranks, stage, saved.rank_state["loader"])


def _open_data(
    cfg: RunConfig, ranks: Ranks, stage: int, state: dict | None = None, bad_records: dict[int, str] | None = None
) -> FaceLoader:
    """What stage ``stage`` reads: the data from their beginning, or from ``state`` on. Stages of equal batches in a row share a loader."""
    batches = [cfg.stage_batch(index) for index in range(stage + 1)]
    sizes = [(batch.micro_batch_size, batch.images_per_step(ranks.world_size)) for batch in batches]
    first = next(index for index in range(stage, -1, -1) if index == 0 or sizes[index - 1] != sizes[stage])
    micro_batch_size, global_batch_size = sizes[stage]
    return FaceLoader(
        cfg.data.path,
        micro_batch_size,
        global_batch_size=global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        backend=cfg.data.backend,
        device_id=ranks.device_id,
        seed=cfg.seed if first == 0 else int(np.random.SeedSequence([cfg.seed, first]).generate_state(1)[0]),  # another order each time
        num_threads=cfg.data.num_threads,
        augment=Augment(**cfg.data.augment.model_dump()),
        decode=Decode(**cfg.data.decode.model_dump()),
        max_bad_records=cfg.data.max_bad_records,
        bad_records=bad_records,
        min_images_per_identity=cfg.data.min_images_per_identity,
        expected_images=cfg.data.num_images,
        expected_classes=cfg.data.num_classes,
        state=state,
    )
