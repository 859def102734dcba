"""The guard with a real engine, head and loader on two ranks: a spike moves nothing on any rank; a bad image is traced to its record."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_pipeline.augment import Augment
from data_pipeline.loader import FaceLoader
from data_pipeline.pack import pack
from data_pipeline.recordio import RecordReader
from model.partial_fc import PartialFC
from model.vit import build_vit
from tests.gathered import full_backbone_weights
from tests.ranks import run_ranks
from tests.unit.record_sets import image_folder
from train.config import GuardConfig, RunConfig
from train.dist import RankError, Ranks
from train.ds_config import load_ds_config
from train.engine import build_engine, build_optimizer
from train.guard import Guard

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
D, BATCH = 16, 4


class Training:
    """What train.build makes, small: steps of two micro-batches."""

    def __init__(self, group, folder: Path, stage: int, precision: str, guard: GuardConfig):
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = Ranks(rank, rank, world_size, world_size, torch.device("cpu"), group)
        self.batches = FaceLoader(folder / "set", BATCH, rank=rank, world_size=world_size, num_threads=1, augment=Augment(flip=0.0))
        recipe = {
            "output": "unused",
            "data": {"path": "unused"},
            "batch": {"micro_batch_size": BATCH, "grad_accum_steps": 2},
            "stages": [{"name": "only", "steps": 9}],
        }
        cfg = RunConfig.model_validate(recipe)
        ds_config, _ = load_ds_config(CONFIGS / f"zero{stage}_{precision}.json", cfg, world_size, "cpu")
        torch.manual_seed(0)
        net = build_vit("vit_xxt", embedding_size=D)
        self.engine = build_engine(net, build_optimizer(net, cfg.optimizer), ds_config)
        self.head = PartialFC(D, self.batches.num_classes, 1.0, (1.0, 0.0, 0.2), 16.0, group=group)
        self.head.set_stage(1.0, "learned", update_expectation=True)
        self.guard = Guard(guard, self.ranks, folder, precision)
        self.guard.enter_stage("only")
        self.step = 0

    def take_step(self, spoil=None):
        """``spoil(micro, images)`` changes a micro-batch. Returns the mean loss, whether the step was applied, and the two batches."""
        batches, losses, finite = [next(self.batches), next(self.batches)], [], True
        for micro, batch in enumerate(batches):
            if spoil:
                spoil(micro, batch.images)
            embeddings = self.engine(batch.images)
            finite &= bool(embeddings.isfinite().all())
            loss = self.head(embeddings, batch.labels)
            self.engine.backward(self.guard.watch(loss, batch.records))
            self.engine.step()
            losses.append(loss.detach())
        applied, loss = self.engine.was_step_applied(), torch.stack(losses).mean()
        self.step += 1
        try:
            self.guard.after_step(
                self.step, loss, applied, lambda: [rank for rank, good in enumerate(self.ranks.gather(finite)) if not good]
            )
        finally:
            if applied:
                self.head.step(1e-2, 0.1)
            else:
                self.head.discard()
        return loss, applied, batches

    def everything_trained(self):
        """Rank 0: the backbone without BatchNorm's statistics, which a skipped step moves; every rank: its centers and expectations."""
        backbone = full_backbone_weights(self.engine, self.ranks.group)
        trained = {name: value for name, value in backbone.items() if "running" not in name and "num_batches" not in name}
        return {**trained, "centers": self.head.weight.clone(), "expectation": self.head.expectation.clone()}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "skipped_steps.jsonl").read_text().splitlines()]


def check_spike(group, folder, precision):
    for stage in (1, 2, 3):
        training = Training(group, folder, stage, precision, GuardConfig(spike_factor=1.5))
        loss, applied, _ = training.take_step()
        assert applied
        # As if 20 steps had been applied, with a mean that any loss of this model is far above.
        training.guard.load_state({**training.guard.state(), "applied": 20, "mean": float(loss) / 4})
        state, before = training.guard.state(), training.everything_trained()
        loss, applied, _ = training.take_step()
        assert loss.isfinite()
        assert not applied, f"ZeRO {stage} {precision}: a spike must skip the step"
        after = training.everything_trained()
        assert [name for name in before if not torch.equal(before[name], after[name])] == [], f"ZeRO {stage} {precision}"
        assert training.guard.state()["mean"] == state["mean"]
        training.guard.load_state({**training.guard.state(), "mean": float(loss)})
        assert training.take_step()[1], "the next step, with a loss like before, must be taken"
        moved = training.everything_trained()
        assert not torch.equal(before["centers"], moved["centers"])
        assert all(value.isfinite().all() for value in moved.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 images of 16 identities in 2 shards."""
    root = tmp_path_factory.mktemp("guard")
    image_folder(root / "src", {f"{i:02d}": 4 for i in range(16)})
    pack([root / "src"], root / "set", 2)
    return root


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_spike_skips_the_step_on_all_ranks_and_moves_nothing(folder, precision):
    (folder / "skipped_steps.jsonl").unlink(missing_ok=True)
    run_ranks(2, check_spike, folder, precision, timeout_s=200)
    lines = lines_of(folder)
    assert [(line["step"], line["reason"], line["ranks"]) for line in lines] == [(2, "spike", [])] * 3  # of ZeRO 1, 2, 3
    assert all(len(set(line["records"]["0"] + line["records"]["1"])) == 2 * 2 * BATCH for line in lines)


def check_bad_image(group, folder):
    training = Training(group, folder, 1, "fp32", GuardConfig(max_skipped=2))

    def spoil(micro, images):
        if micro == 1 and training.ranks.rank == 1:
            images[2, 0, 0, 0] = float("nan")

    _, applied, batches = training.take_step(spoil)
    assert not applied
    assert training.take_step()[1]
    training.take_step(spoil)
    with pytest.raises(
        RankError, match=r"steps 3 to 4 were all skipped: loss not finite \(2 x\) on rank 1; the last loss is nan\. The rec"
    ):
        training.take_step(spoil)
    return batches[1].records(), batches[1].labels.tolist()


def test_an_image_that_is_not_finite_is_traced_to_its_rank_and_its_micro_batch_and_stops_every_rank_in_time(folder):
    (folder / "skipped_steps.jsonl").unlink(missing_ok=True)
    _, (records, labels) = run_ranks(2, check_bad_image, folder)
    lines = lines_of(folder)
    assert [(line["step"], line["reason"], line["ranks"]) for line in lines] == [(step, "loss not finite", [1]) for step in (1, 3, 4)]
    assert lines[0]["records"] == {"1": records}
    found = [re.fullmatch(r"(\S+) offset (\d+) \(key \d+\)", name).groups() for name in records]
    assert [RecordReader(folder / "set" / shard).read_at(int(offset)).labels[0] for shard, offset in found] == labels
