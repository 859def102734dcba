"""The mean of the backbone's weights, kept as ZeRO partitions, against one in float64 over whole weights."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from eval.embedder import load_embedder
from model.vit import build_vit
from tests.gathered import full_backbone_weights
from tests.ranks import run_ranks
from tests.reference import relative_error
from train.checkpoint import Checkpoints, Identity, Layout
from train.checkpoint_folder import Retention
from train.config import ConfigError, RunConfig
from train.dist import Ranks
from train.ds_config import load_ds_config
from train.ema import BackboneEma
from train.engine import build_engine, build_optimizer
from train.engine_state import local_masters

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
D, BATCH, DECAY = 16, 4, 0.25
# The warm-up gives 1/10, 2/11, then 3/12 = DECAY: both sides of the bound are met.
STEPS = 5
# Each of the STEPS updates rounds to float32 (2^-24 = 6e-8) two or three times. A mean of bfloat16 weights would be 2e-3 off.
EMA_ERROR = 1e-6


def start(config, group, offload=False):
    """A fresh engine as the shipped JSON makes it; ``offload``: with its optimizer on the CPU."""
    cfg = RunConfig.model_validate(
        {
            "output": "unused",
            "data": {"path": "unused"},
            "batch": {"micro_batch_size": BATCH},
            "optimizer": {"lr": 1e-2},
            "stages": [{"name": "only", "steps": STEPS}],
        }
    )
    ds_config, _ = load_ds_config(CONFIGS / f"{config}.json", cfg, dist.get_world_size(group), "cpu")
    if offload:
        ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        ds_config["zero_force_ds_cpu_optimizer"] = False
    torch.manual_seed(0)
    net = build_vit("vit_xxt", drop_path=0.0, embedding_size=D)
    return build_engine(net, build_optimizer(net, cfg.optimizer), ds_config)


def take_step(engine, group, step, poison=False):
    """Draw the embeddings to directions of the rank's own. ``poison``: the last rank's gradient is not finite. Returns the loss."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank(group))
    images = torch.randn(BATCH, 3, 112, 112, generator=generator) + dist.get_rank(group)
    targets = torch.randn(BATCH, D, generator=generator)
    loss = (engine(images) - targets).square().mean()
    engine.backward(loss * float("inf") if poison and dist.get_rank(group) == 1 else loss)
    engine.step()
    return float(loss)


def gathered(value, group):
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class Reference:
    """The mean in float64, of whole weights; BatchNorm statistics per rank, pooled when asked for. Communicates at every turn."""

    def __init__(self, engine, group):
        self.engine, self.group, self.updates = engine, group, 0
        self.weights, self.statistics = self._present()

    def _present(self):
        weights = {name: w.double() for name, w in full_backbone_weights(self.engine, self.group).items()}
        statistics = {name: b.double() for name, b in self.engine.module.named_buffers() if "running" in name}
        return {name: w for name, w in weights.items() if "running" not in name and "num" not in name}, gathered(statistics, self.group)

    def update(self):
        decay = [1 / 10, 2 / 11, DECAY, DECAY, DECAY][self.updates]
        weights, statistics = self._present()
        self.weights = {name: decay * self.weights[name] + (1 - decay) * w for name, w in weights.items()}
        self.statistics = [
            {name: decay * mean[name] + (1 - decay) * b for name, b in now.items()}
            for mean, now in zip(self.statistics, statistics, strict=True)
        ]
        self.updates += 1

    def pooled(self):
        """What every rank's images together have: mean of the means, mean of the variances plus variance of the means."""
        weights = dict(self.weights)
        for name in [name for name in self.statistics[0] if name.endswith("running_mean")]:
            means = torch.stack([rank[name] for rank in self.statistics])
            variance = name.replace("running_mean", "running_var")
            weights[name] = means.mean(0)
            weights[variance] = torch.stack([rank[variance] for rank in self.statistics]).mean(0) + means.var(0, correction=0)
        return weights


def mean_weights(ema, engine, group):
    """The mean gathered as the weights are: for a moment it takes their place."""
    masters, buffers = local_masters(engine), dict(engine.module.named_buffers())
    pairs = [*zip(masters, ema.means, strict=True), *((buffers[name], mean) for name, mean in ema.state()["buffers"].items())]
    kept = [weight.clone() for weight, _ in pairs]
    for weight, mean in pairs:
        weight.data.copy_(mean)
    weights = full_backbone_weights(engine, group)
    for (weight, _), old in zip(pairs, kept, strict=True):
        weight.data.copy_(old)
    return weights


def check_reference(group, config, offload=False):
    engine = start(config, group, offload)
    ema, reference = BackboneEma(engine, DECAY), Reference(engine, group)
    for step in range(STEPS):
        take_step(engine, group, step)
        ema.update()
        reference.update()
    mean, last, expected = mean_weights(ema, engine, group), full_backbone_weights(engine, group), reference.pooled()
    if dist.get_rank(group) == 0:
        assert mean.keys() == last.keys()
        assert expected.keys() == {name for name in mean if "num_batches" not in name}
        for name, value in expected.items():
            assert relative_error(mean[name], value) < EMA_ERROR, name
            still = name == "mask_token"  # no token is dropped here
            assert still or relative_error(mean[name], last[name]) > 1e-4, f"{name}: a test that last weights pass proves nothing"


PARTITIONS = [f"zero{stage}_{precision}" for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize("config", PARTITIONS)
def test_the_mean_is_that_of_the_float32_weights_after_every_step(config):
    run_ranks(2, check_reference, config)


@pytest.mark.parametrize("config", ["zero1_bf16", "zero3_bf16"])
def test_masters_that_are_offloaded_to_the_cpu_are_averaged_as_well(config):
    run_ranks(2, check_reference, config, True)


def check_state(group, config):
    engine = start(config, group)
    ema = BackboneEma(engine, DECAY)
    for step in range(2):
        take_step(engine, group, step)
        ema.update()
    other = BackboneEma(engine, DECAY)
    for mean, saved in zip(other.means, ema.means, strict=True):
        mean.copy_(saved)
    other.load_state(ema.state())
    for step in range(2, STEPS):
        take_step(engine, group, step)
        ema.update()
        other.update()
    mean, continued = mean_weights(ema, engine, group), mean_weights(other, engine, group)
    assert all(torch.equal(mean[name], continued[name]) for name in mean)


@pytest.mark.parametrize("config", ["zero1_bf16", "zero2_fp32", "zero3_bf16"])
def test_a_mean_continued_from_its_state_goes_on_bit_for_bit(config):
    run_ranks(2, check_state, config)


def check_checkpoint(group, folder, config):
    """Trained, saved and restored into a fresh engine, the mean goes on bit for bit; a skipped step in between leaves it alone."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    ranks = Ranks(rank, rank, world_size, world_size, torch.device("cpu"), group)
    checkpoints = Checkpoints(folder, ranks, Identity("fp32", {"stages": []}, {}), Layout(world_size, 1, []), Retention(9), "vit_xxt")

    def train(engine, ema, steps):
        for step in steps:
            take_step(engine, group, step, poison=step == 1)
            applied = engine.was_step_applied()
            assert applied == (step != 1)
            if applied:
                ema.update()

    engine = start(config, group)
    ema = BackboneEma(engine, DECAY)
    train(engine, ema, [0])
    before = mean_weights(ema, engine, group)
    train(engine, ema, [1])
    after = mean_weights(ema, engine, group)
    assert all(torch.equal(after[name], before[name]) for name in before if "num_batches" not in name), "a skipped step moved the mean"
    train(engine, ema, [2])
    checkpoints.save(3, engine, ema, {}, {})
    train(engine, ema, [3, 4])
    expected = mean_weights(ema, engine, group)

    engine = start(config, group)
    ema = BackboneEma(engine, DECAY)
    checkpoints.finish()
    path = folder / "step_00000003"
    checkpoints.read(path).restore(engine, ema, 0, rank)
    restored = mean_weights(ema, engine, group)
    if rank == 0:
        saved = load_file(path / "backbone_ema.safetensors")
        assert saved.keys() == load_file(path / "backbone.safetensors").keys()
        assert all(torch.equal(saved[name], weight) for name, weight in restored.items())
    train(engine, ema, [3, 4])
    continued = mean_weights(ema, engine, group)
    assert all(torch.equal(continued[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("config", ["zero1_fp32", "zero1_bf16", "zero2_bf16", "zero3_fp32"])
def test_a_checkpoint_holds_the_mean_continues_it_bit_for_bit_and_opens_for_evaluation(config, tmp_path):
    run_ranks(2, check_checkpoint, tmp_path, config)
    images = torch.randint(0, 256, (2, 112, 112, 3), dtype=torch.uint8).numpy()
    last, mean = (load_embedder(tmp_path / "step_00000003" / name)(images) for name in ("backbone.safetensors", "backbone_ema.safetensors"))
    assert relative_error(mean, last) > 1e-4
    assert "backbone_ema.safetensors" in (tmp_path / "step_00000003/manifest.json").read_text()


class Engine:
    """What a mean needs of an engine, with masters of a kind that the shipped configs do not make."""

    def __init__(self, **masters):
        self.module, self.optimizer = torch.nn.Linear(2, 2), type("ZeroOptimizer", (), masters)()


@pytest.mark.parametrize(
    ("masters", "found"),
    [
        ({}, "none in ZeroOptimizer"),
        ({"fp32_partitioned_groups_flat": [torch.empty(0)]}, "torch.float32 \\[0\\]"),  # on NVMe
        ({"single_partition_of_fp32_groups": [torch.ones(3, dtype=torch.bfloat16)]}, "torch.bfloat16 \\[3\\]"),
    ],
)
def test_masters_out_of_reach_are_refused_with_what_was_found(masters, found):
    with pytest.raises(ConfigError, match=f"float32 master weights.*found .*{found}"):
        BackboneEma(Engine(**masters), 0.9)
