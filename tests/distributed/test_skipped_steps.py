"""One fate per step, with the configs as shipped: a gradient that is not finite on one rank moves nothing on any rank."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.partial_fc import PartialFC
from model.vit import build_vit
from tests.gathered import full_backbone_weights
from tests.ranks import run_ranks
from train.config import RunConfig
from train.ds_config import load_ds_config
from train.engine import build_engine, build_optimizer

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
D, CLASSES, BATCH = 16, 12, 4


def recipe():
    stages = [{"name": "only", "steps": 9, "update_expectation": True}]
    return RunConfig.model_validate(
        {"output": "unused", "data": {"path": "unused"}, "batch": {"micro_batch_size": BATCH, "grad_accum_steps": 2}, "stages": stages}
    )


def take_step(engine, head, rank, poison=None):
    """One step of two micro-batches; ``poison`` changes what the last rank sees in the first. Returns whether it was applied."""
    for micro in range(2):
        generator = torch.Generator().manual_seed(10 * rank + micro)
        images = torch.randn(BATCH, 3, 112, 112, generator=generator)
        if poison == "image" and micro == 0 and rank == 1:
            images[0, 0, 0, 0] = float("inf")
        embeddings = engine(images)
        if poison == "backbone gradient" and micro == 0 and rank == 1:
            embeddings.register_hook(lambda grad: torch.full_like(grad, float("inf")))
        loss = head(embeddings, torch.randint(0, CLASSES, (BATCH,), generator=generator))
        if poison == "class center" and micro == 0 and rank == 1:
            head.weight[0, 0] = float("nan")  # seen by the second micro-batch; the caller restores it
        engine.backward(loss)
        engine.step()
    return engine.was_step_applied()


def check(group, precision, poison):
    rank, cfg = dist.get_rank(group), recipe()
    for stage in (1, 2, 3):
        ds_config, _ = load_ds_config(CONFIGS / f"zero{stage}_{precision}.json", cfg, dist.get_world_size(group), "cpu")
        torch.manual_seed(0)
        net = build_vit("vit_xxt", embedding_size=D)
        engine = build_engine(net, build_optimizer(net, cfg.optimizer), ds_config)
        head = PartialFC(D, CLASSES, 1.0, (1.0, 0.0, 0.2), 16.0, group=group)
        head.set_stage(1.0, "learned", update_expectation=True)
        assert take_step(engine, head, rank)
        head.step(1e-2, 0.1)
        backbone, centers, expectation = full_backbone_weights(engine, group), head.weight.clone(), head.expectation.clone()
        assert not take_step(engine, head, rank, poison), f"ZeRO {stage} {precision}: the step must be skipped on every rank"
        head.discard()
        head.weight.copy_(centers)  # the poison
        after = full_backbone_weights(engine, group)
        assert all(weight.isfinite().all() for weight in after.values()), "not even a running statistic"
        for name, weight in backbone.items():  # on rank 0
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(after[name], weight), f"ZeRO {stage} {precision}: {name} moved in a skipped step"
        assert torch.equal(head.expectation, expectation)
        assert take_step(engine, head, rank), "the next good step must be taken"
        head.step(1e-2, 0.1)
        assert not torch.equal(head.weight, centers)
        moved = full_backbone_weights(engine, group)
        assert all(weight.isfinite().all() for weight in moved.values())
        assert all(not torch.equal(moved[name], weight) for name, weight in backbone.items() if name.endswith("qkv.weight"))


@pytest.mark.parametrize("poison", ["image", "class center", "backbone gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(precision, poison):
    run_ranks(2, check, precision, poison, timeout_s=200)
