"""A run: everything that training needs, built once, and what happens around the steps of the loop."""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from data_pipeline.loader import Augment, FaceLoader
from eval.pairs import find_pairs
from model.partial_fc import PartialFC
from model.vit import build_vit
from train.checkpoint import CheckpointError, Checkpoints, Identity, Saved
from train.config import ConfigError, RunConfig
from train.dist import RankError, Ranks
from train.ds_config import DeepSpeedSummary
from train.engine import build_engine, build_optimizer, loss_scale
from train.metrics import BuildInfo, Metrics, PhaseTimer, StepRecord
from train.report import announce, progress_line, stage_line
from train.schedule import learning_rate
from train.stages import Stage, StageLosses, StageManager

# Sections of DeepSpeed's JSON that change numbers, beyond ZeRO stage and precision.
_NUMERIC_SECTIONS = ("communication_data_type", "data_types", "torch_autocast", "bf16", "fp16")
_MAX_SKIPPED_IN_A_ROW = 50  # fp16 finds its loss scale within 20


@dataclass
class _Window:
    """What happened since the last log line."""

    start: float = field(default_factory=time.monotonic)
    steps: int = 0
    skipped: int = 0
    losses: list[Tensor] = field(default_factory=list)
    head_gradient_norm: Tensor | float = math.nan

    def add(self, loss: Tensor, applied: bool) -> None:
        self.steps += 1
        self.skipped += not applied
        self.losses.append(loss)

    def mean_loss(self) -> float:
        return float(torch.stack(self.losses).mean())

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "losses": list(map(float, self.losses)),
            "seconds": time.monotonic() - self.start,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> _Window:
        losses = [torch.tensor(loss, device=device) for loss in state["losses"]]
        return cls(time.monotonic() - state["seconds"], state["steps"], state["skipped"], losses)


@dataclass
class Run:
    """State of one training run on this rank."""

    cfg: RunConfig
    ranks: Ranks
    batches: FaceLoader
    engine: object  # deepspeed.DeepSpeedEngine
    head: PartialFC
    stages: StageManager
    losses: StageLosses
    checkpoints: Checkpoints
    metrics: Metrics
    timer: PhaseTimer
    step: int = 0  # completed optimizer steps
    window: _Window = field(default_factory=_Window)
    last_checkpoint: Path | None = None
    images_trained: int = 0  # over all ranks, without the current window
    seconds_trained: float = 0.0
    skipped_in_a_row: int = 0
    lock: TextIO | None = None  # open as long as the run writes to its output

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.step * self.cfg.batch.grad_accum_steps / self.batches.steps_per_epoch

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.ranks.is_first:
            print(text, flush=True)

    def learning_rate(self) -> float:
        """Of the step that is about to be taken."""
        schedule = self.cfg.schedule
        return learning_rate(
            self.step,
            base_lr=self.cfg.optimizer.lr,
            warmup_steps=_warmup_steps(self.cfg, self.batches),
            total_steps=self.stages.total_steps,
            decay=schedule.decay,
            power=schedule.power,
            final_lr=schedule.final_lr,
        )

    def enter_stage(self) -> None:
        """Switch the head if the coming step begins a stage (or the process)."""
        stage = self.stages.enter(self.step, self.head)
        if stage is not None:
            self.say(stage_line(stage))

    def measure_head_gradient(self) -> None:
        """On steps that will be logged: the norm of the centers' gradient. Collectives: one all-reduce."""
        if self._log_due(self.step + 1):
            self.window.head_gradient_norm = self.head.gradient_norm()

    def record(self, losses: list[Tensor], lr: float, applied: bool) -> None:
        """Note the step just taken; on logging steps publish the window and print a line. ``losses``: one a micro-batch, on the device."""
        stage = self.stages.at(self.step - 1)
        loss = torch.stack(losses).mean()
        self.losses.record(stage.name, loss)
        self.window.add(loss, applied)
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self._log_due(self.step):
            self._publish(stage, lr, float(self.engine.get_global_grad_norm()) if applied else math.nan)
        if self.skipped_in_a_row == _MAX_SKIPPED_IN_A_ROW:
            raise RankError(
                f"steps {self.step - _MAX_SKIPPED_IN_A_ROW + 1} to {self.step} were all skipped: a gradient was not finite (last loss "
                f"{float(loss):g}). Start again with a lower optimizer.lr, a longer warm-up or a smaller margin"
            )

    def _log_due(self, step: int) -> bool:
        return step % self.cfg.metrics.log_every == 0 or step == self.stages.total_steps

    def _publish(self, stage: Stage, lr: float, gradient_norm: float) -> None:
        window, now = self.window, time.monotonic()
        images = window.steps * self.cfg.global_batch_size(self.ranks.world_size)
        seconds = now - window.start
        self.images_trained += images
        self.seconds_trained += seconds
        record = StepRecord(
            step=self.step,
            epoch=self.epoch,
            stage=stage.index,
            stage_name=stage.name,
            sample_rate=stage.config.sample_rate,
            loss=window.mean_loss(),
            target_cosine=float(self.head.target_cosine),
            learning_rate=lr,
            gradient_norm=gradient_norm,
            head_gradient_norm=float(window.head_gradient_norm),
            loss_scale=loss_scale(self.engine),
            images=images,
            steps=window.steps,
            skipped_steps=window.skipped,
            images_per_second=images / seconds,
            step_seconds=self.timer.window(window.steps),
            eta_seconds=(self.stages.total_steps - self.step) * seconds / window.steps,
        )
        self.metrics.record_step(record)
        self.say(progress_line(record, self.stages.total_steps))
        self.window = _Window()

    def checkpoint_due(self) -> bool:
        every = self.cfg.checkpoint.every_steps
        return any(self.step == stage.stop for stage in self.stages.stages) or (every is not None and self.step % every == 0)

    def save(self) -> None:
        """Commit a checkpoint of this step. Collectives: see Checkpoints.save."""
        begin = time.monotonic()
        rank_state = {"head": self.head.state(), "loader": self.batches.state()}
        run_state = {
            "stage": self.stages.at(self.step - 1).name,
            "epoch": self.epoch,
            "losses": self.losses.state(),
            "window": self.window.state(),
            "trained": {"images": self.images_trained, "seconds": self.seconds_trained},
        }
        self.last_checkpoint = self.checkpoints.save(self.step, self.engine, rank_state, run_state)
        self.say(f"checkpoint {self.last_checkpoint}")
        self.window.start += time.monotonic() - begin  # throughput is of training; saving is not counted

    def close(self) -> None:
        self.metrics.close()
        if self.lock:
            self.lock.close()


def build_run(cfg: RunConfig, ds_config: dict, summary: DeepSpeedSummary, ranks: Ranks) -> Run:
    """Build the run, resumed from its newest complete checkpoint if the recipe says so.

    Raises RankError on every rank if anything given is wrong on any. Collectives: those of the engine's start and of the checkpoint's load.
    """

    def say(text: str) -> None:
        if ranks.is_first:
            print(text, flush=True)

    lock = ranks.together(lambda: _lock(cfg.output, say) if ranks.is_first else None)
    if cfg.eval:
        ranks.together(lambda: find_pairs(cfg.eval.images, cfg.eval.pairs) if ranks.is_first else None)
    numerics = {key: ds_config[key] for key in _NUMERIC_SECTIONS if key in ds_config}
    identity = Identity(ranks.world_size, summary.zero_stage, summary.precision, cfg.mathematics(), numerics)
    backbone_metadata = {"preset": cfg.model.name, "embedding_size": str(cfg.model.embedding_size)}
    checkpoints = Checkpoints(cfg.output / "checkpoints", ranks, identity, cfg.checkpoint.keep_last, backbone_metadata)
    newest = checkpoints.newest(say)
    saved = ranks.together(lambda: _read_checkpoint(cfg, checkpoints, newest))
    if saved:
        say(f"resuming from {newest}: step {saved.step}, stage {saved.run_state['stage']}")
    batches = ranks.together(lambda: _open_data(cfg, ranks, saved))
    _check_agreement(ranks, cfg, ds_config, batches)
    stages = ranks.together(lambda: _plan_stages(cfg, batches))
    build = BuildInfo(ranks.world_size, summary.zero_stage, summary.precision)
    metrics = ranks.together(
        lambda: Metrics(cfg.output / "metrics.jsonl", cfg.metrics.host, cfg.metrics.port, ranks.rank, ranks.local_rank, build)
    )

    torch.manual_seed(cfg.seed)  # the same weights on every rank
    backbone = build_vit(
        cfg.model.name,
        mask_ratio=cfg.model.mask_ratio,
        drop_path=cfg.model.drop_path,
        embedding_size=cfg.model.embedding_size,
        activation_checkpointing=cfg.model.activation_checkpointing,
    )
    optimizer = ranks.together(lambda: build_optimizer(backbone, cfg.optimizer))
    engine = build_engine(backbone, optimizer, ds_config)
    margin = cfg.head.margin
    head = PartialFC(
        cfg.model.embedding_size,
        batches.num_classes,
        margin=(margin.m1, margin.m2, margin.m3),
        scale=cfg.head.scale,
        margin_gradient=cfg.head.margin_gradient,
        group=ranks.group,
        seed=cfg.seed,
        optimizer=cfg.head.optimizer,
        betas=cfg.optimizer.betas,
        eps=cfg.optimizer.eps,
        device=ranks.device,
    )
    # From here on every rank draws its own dropped patches and paths.
    torch.manual_seed(int(np.random.SeedSequence([cfg.seed, ranks.rank]).generate_state(1, np.uint64)[0]))
    losses = StageLosses()
    if saved:
        saved.restore(engine)
        head.load_state(saved.rank_state["head"])
        losses.load_state(saved.run_state["losses"])

    run = Run(cfg, ranks, batches, engine, head, stages, losses, checkpoints, metrics, PhaseTimer(ranks.device.type), lock=lock)
    if saved:
        run.step, run.last_checkpoint = saved.step, saved.folder
        run.window = _Window.from_state(saved.run_state["window"], ranks.device)
        run.images_trained, run.seconds_trained = saved.run_state["trained"]["images"], saved.run_state["trained"]["seconds"]
    announce(run, ds_config, summary)
    return run


def _lock(output: Path, say: Callable[[str], None]) -> TextIO | None:
    """Keep a second run out of ``output``: ranks may outlive a launcher that was killed."""
    output.mkdir(parents=True, exist_ok=True)
    file = (output / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{output}: another run is writing here; end its processes first, or choose another output") from None
    except OSError as error:  # a file system without locks
        say(f"{output} cannot be locked ({error.strerror}): make sure that no other run writes here")
    return file


def _check_agreement(ranks: Ranks, cfg: RunConfig, ds_config: dict, batches: FaceLoader) -> None:
    """Nodes may hold stale copies of a file. Raises RankError. Collectives: one gather."""
    mine = {"recipe": cfg.mathematics(), "deepspeed": ds_config, "data set": batches.fingerprint["set"]}
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
        if cfg.resume == "required":
            raise CheckpointError(
                f"{checkpoints.folder}: no checkpoint to resume from, and resume=required; check output, or set resume=auto"
            )
        return None
    return checkpoints.read(newest)


def _open_data(cfg: RunConfig, ranks: Ranks, saved: Saved | None) -> FaceLoader:
    return FaceLoader(
        cfg.data.path,
        cfg.batch.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device_id=ranks.device_id,
        seed=cfg.seed,
        num_threads=cfg.data.num_threads,
        augment=Augment(**cfg.data.augment.model_dump()),
        min_images_per_identity=cfg.data.min_images_per_identity,
        state=saved.rank_state["loader"] if saved else None,
    )


def _plan_stages(cfg: RunConfig, batches: FaceLoader) -> StageManager:
    stages = StageManager(cfg.stages, batches.steps_per_epoch, cfg.batch.grad_accum_steps)
    warmup = _warmup_steps(cfg, batches)
    if warmup > stages.total_steps:
        raise ConfigError(f"schedule: a warm-up of {warmup} steps is longer than the whole run of {stages.total_steps} steps")
    return stages


def _warmup_steps(cfg: RunConfig, batches: FaceLoader) -> int:
    if cfg.schedule.warmup_steps is not None:
        return cfg.schedule.warmup_steps
    return round(cfg.schedule.warmup_epochs * batches.steps_per_epoch / cfg.batch.grad_accum_steps)
