"""The DeepSpeed engine with the head outside it follows one plain process: losses, gradient norms and weights, ZeRO 1, 2 and 3.

The reference is torch alone: the same backbone, run once per rank's share of the batch because BatchNorm sees a rank's share, the float64
head of tests/reference.py, ``torch.optim.AdamW`` and ``clip_grad_norm_``. AdamW hides a wrong constant factor in its gradient, so eps is
1e-3 (the size of the gradients here), which makes the update depend on it, and the gradient norms are compared themselves. The parameters
without weight decay are compared by themselves too: they are few, and a decayed one would be lost in the movement of the others.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.class_shard import ClassShard, initial_centers
from model.partial_fc import PartialFC
from model.vit import build_vit
from tests.gathered import full_backbone_weights
from tests.ranks import run_ranks
from tests.reference import adamw_reference, head_reference, relative_error
from train.config import OptimizerConfig
from train.engine import build_engine, build_optimizer, set_learning_rate

STEPS, BATCH, CLASSES, D, SEED = 10, 32, 37, 16, 4
LR, WEIGHT_DECAY, EPS, CLIP = 5e-4, 0.05, 1e-3, 1.0
HEAD = {"margin": (1.0, 0.0, 0.2), "scale": 16.0, "margin_gradient": "exact"}
# Relative, after ten float32 steps whose sums over ranks are taken in another order. A wrong factor would be an error of order 1.
LOSS_ERROR, NORM_ERROR, MOVEMENT_ERROR = 1e-6, 1e-5, 1e-4


def data(micro_batch):
    generator = torch.Generator().manual_seed(50 + micro_batch)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    return torch.randn(BATCH, 3, 112, 112, generator=generator).clamp_(-1, 1), labels


def backbone():
    """The ViT, but for GELU in the place of ReLU6: an activation within rounding of a kink would fall on its other side, and move the
    weights apart by 2e-3."""
    torch.manual_seed(0)
    net = build_vit("vit_xxt", drop_path=0.0, embedding_size=D)
    for block in net.blocks:
        block.mlp.forward = partial(smooth_mlp, block.mlp)
    return net


def smooth_mlp(mlp, x):
    return mlp.fc2(F.gelu(mlp.fc1(x)))


def is_decayed(name, parameter):
    """Of this backbone: the matrices of its linear layers and of its patch projection."""
    return parameter.ndim > 1 and name not in ("pos_embed", "mask_token")


def movement(weights):
    """How far the backbone weights went, as two vectors: those with weight decay and those without."""
    start = dict(backbone().named_parameters())
    moved = {name: (weights[name] - start[name]).detach().flatten() for name in start}
    return [torch.cat([moved[name] for name in moved if is_decayed(name, start[name]) == decayed]) for decayed in (True, False)]


def reference_run(world_size, grad_accum_steps):
    """(losses, backbone gradient norms, head gradient norms, movement of the backbone, movement of the centers) of one process."""
    torch.set_num_threads(1)
    net, start = backbone(), initial_centers(ClassShard(CLASSES, 0, 1), D, SEED)
    decayed, others = ([p for name, p in net.named_parameters() if is_decayed(name, p) == which] for which in (True, False))
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": WEIGHT_DECAY}]
    adamw = torch.optim.AdamW(groups, lr=LR, eps=EPS)
    centers, history, losses, norms, head_norms = start, [], [], [], []
    for step in range(STEPS):
        adamw.zero_grad()
        total, centers_grad = 0.0, torch.zeros(CLASSES, D, dtype=torch.float64)
        for micro in range(grad_accum_steps):
            images, labels = data(step * grad_accum_steps + micro)
            embeddings = torch.cat([net(share) for share in images.chunk(world_size)])
            head = head_reference(embeddings.detach(), centers, labels, **HEAD)
            (embeddings.double() * (head.embeddings_grad / grad_accum_steps)).sum().backward()
            centers_grad += head.centers_grad / grad_accum_steps
            total += head.loss / grad_accum_steps
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)))
        adamw.step()
        history.append(dict(enumerate(centers_grad)))
        head_norms.append(float(centers_grad.norm()))
        centers = adamw_reference(start, history, lr=LR, weight_decay=WEIGHT_DECAY, eps=EPS)
        losses.append(total)
    return losses, norms, head_norms, movement(dict(net.named_parameters())), centers - start


def engine_run(group, zero_stage, grad_accum_steps):
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": zero_stage},
        "steps_per_print": 10**9,
    }
    net = backbone()
    optimizer = build_optimizer(net, OptimizerConfig(lr=1.0, weight_decay=WEIGHT_DECAY, eps=EPS))  # the rate is set at every step
    engine = build_engine(net, optimizer, config)
    head = PartialFC(D, CLASSES, 1.0, **HEAD, group=group, seed=SEED, eps=EPS)
    losses, norms, head_norms = [], [], []
    for step in range(STEPS):
        set_learning_rate(engine, LR)
        total = 0.0
        for micro in range(grad_accum_steps):
            images, labels = data(step * grad_accum_steps + micro)
            loss = head(engine(images.chunk(world_size)[rank]), labels.chunk(world_size)[rank])
            engine.backward(loss)
            engine.step()
            total += float(loss) / grad_accum_steps
        assert engine.was_step_applied()
        norms.append(float(engine.get_global_grad_norm()))
        head_norms.append(float(head.gradient_norm()))
        head.step(LR, WEIGHT_DECAY)
        losses.append(total)
    parts = [None] * world_size
    dist.all_gather_object(parts, head.weight, group=group)
    weights = full_backbone_weights(engine, group)
    return (
        losses,
        norms,
        head_norms,
        movement(weights) if rank == 0 else None,
        torch.cat(parts) - initial_centers(ClassShard(CLASSES, 0, 1), D, SEED),
    )


def engine_runs(group, grad_accum_steps):
    return {stage: engine_run(group, stage, grad_accum_steps) for stage in (1, 2, 3)}


@pytest.mark.parametrize(("world_size", "grad_accum_steps"), [(2, 1), (2, 2), (4, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_zero_1_2_and_3_follow_a_single_process(world_size, grad_accum_steps):
    losses, norms, head_norms, backbone_moved, centers_moved = reference_run(world_size, grad_accum_steps)
    assert all(float(moved.norm()) > 0.01 for moved in backbone_moved)
    assert float(centers_moved.norm()) > 0.01
    for rank, runs in enumerate(run_ranks(world_size, engine_runs, grad_accum_steps, timeout_s=240)):
        for stage, run in runs.items():
            where = f"rank {rank} ZeRO {stage}"
            assert run[0] == pytest.approx(losses, rel=LOSS_ERROR), where
            assert run[1] == pytest.approx(norms, rel=NORM_ERROR), where
            assert run[2] == pytest.approx(head_norms, rel=NORM_ERROR), where
            if rank == 0:
                for moved, expected in zip(run[3], backbone_moved, strict=True):
                    assert relative_error(moved, expected) < MOVEMENT_ERROR, where
            assert relative_error(run[4], centers_moved) < MOVEMENT_ERROR, where
