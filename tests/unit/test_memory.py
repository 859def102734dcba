"""The memory of a plan against tensors counted one by one: backbone and head at full size, DeepSpeed's real engine, 64 heads."""

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.activations import activations
from model.head_memory import HeadShape, head_memory
from model.partial_fc import ROW_STATE, PartialFC
from model.vit import PRESETS, build_vit
from tests.ranks import run_ranks, run_thread_ranks
from tests.tensor_memory import AloneOf, TensorMemory, head_on_meta, step_on_meta
from train.config import load_run_config
from train.ds_config import load_ds_config
from train.memory import Backbone, ZeroSettings, head_shape, stage_memory
from train.speed import step_traffic

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOSE = 0.01  # what small tensors that no term names come to
MODES = ("learned", "pco", "pco_shared", "epl", "replace", "vpl")


@pytest.mark.parametrize(
    ("name", "dtype", "checkpointing", "mask_ratio"),
    [
        *itertools.product(("vit_t", "vit_s", "vit_b", "vit_l"), DTYPES, (False, True), (0.0,)),
        ("vit_l", "bf16", False, 0.1),
        ("vit_t", "fp32", True, 0.3),
    ],
)
def test_a_backbone_holds_what_is_planned(name, dtype, checkpointing, mask_ratio):
    options = {"mask_ratio": mask_ratio, "activation_checkpointing": checkpointing}
    live, peak = step_on_meta(name, 64, DTYPES[dtype], **options)
    with torch.device("meta"):
        net = build_vit(name)
    size = DTYPES[dtype].itemsize
    parameters, block = (size * sum(p.numel() for p in module.parameters()) for module in (net, net.blocks[0]))
    embedding_layer = size * net.feature[0].weight.numel()
    acts = activations(PRESETS[name], 64, weight_bytes=size, **options)
    held = parameters + acts.images
    assert held + acts.kept == pytest.approx(live, rel=CLOSE)
    # Plain torch keeps every gradient; that of a block's fc2, a third of the block, is there when its backward holds most.
    depth = len(net.blocks)
    blocks = (acts.in_backward(left, depth) + block * (depth - left) + block // 3 for left in range(1, depth + 1))
    assert held + embedding_layer + max(acts.kept, *blocks) == pytest.approx(peak, rel=CLOSE)


def large_head(**changes) -> HeadShape:
    """Of WebFace42M on 64 ranks."""
    return HeadShape(**{"embedding_size": 512, "num_classes": 2_059_906, "world_size": 64, "micro_batch_size": 384} | changes)


HEADS = [
    *(
        {"centers": mode, "sample_rate": rate, "product_bytes": size}
        for mode, rate, size in itertools.product(MODES, (1.0, 0.3, 0.1), (2, 4))
    ),
    {"curricular": True},
    {"uniface": True},
    {"logits_in_float32": True},
    {"optimizer": "dense", "sample_rate": 0.3},
    {"chunk_rows": 512},
    {"world_size": 8, "num_classes": 360_232, "micro_batch_size": 128},
    {"world_size": 1, "num_classes": 93_431, "micro_batch_size": 128},
]


@pytest.mark.parametrize("changes", HEADS, ids=str)
def test_a_head_holds_what_is_planned(changes):
    shape = large_head(update_expectation=True, **changes)
    arguments = {"loss": "uniface"} if shape.uniface else {"interclass_filter": 0.5} if shape.logits_in_float32 else {}
    peak, left, later = head_on_meta(shape, **arguments)
    planned = head_memory(shape)
    assert planned.call == pytest.approx(peak, rel=0.03)
    assert planned.pending == pytest.approx(left, rel=CLOSE)
    assert planned.pending + planned.stepping == pytest.approx(later, rel=0.03, abs=8 * 2**20)


@pytest.mark.parametrize(("centers", "optimizer"), [("learned", "row_sparse"), ("vpl", "row_sparse"), ("pco", "dense")])
def test_the_bytes_of_64_heads_are_planned_exactly(centers, optimizer):
    classes, size = 6_437, 16  # 100 or 101 a rank
    found = run_thread_ranks(64, state_bytes, classes, size, centers, optimizer)
    for rank, (of_rows, of_moments) in enumerate(found):
        planned = head_memory(HeadShape(size, classes, 64, 2, rank, centers=centers, optimizer=optimizer))
        assert of_rows == planned.state
        assert of_moments == planned.moments + planned.step_counts
    assert len({of_rows for of_rows, _ in found}) == 2


def state_bytes(group, classes, size, centers, optimizer) -> tuple[int, int]:
    """Bytes of memory behind what has a row a class, and behind the optimizer's part of it."""
    head = PartialFC(size, classes, group=group, centers=centers, optimizer=optimizer)

    def behind(tensors) -> int:
        return sum(t.untyped_storage().nbytes() for t in tensors if t.untyped_storage().nbytes() > 8)  # not the step of DenseAdamW

    state = {name: tensor for name, tensor in head.state().items() if name in ROW_STATE}
    if optimizer == "dense":
        del state["steps"]  # one number, written out for a checkpoint
    return behind(state.values()), behind(head._optimizer.state().values()) if optimizer != "dense" else behind(list(state.values())[-2:])


@pytest.mark.parametrize(
    ("config", "world_size", "changes"),
    [
        ("zero1_bf16", 64, []),
        ("zero1_bf16", 64, ["model.activation_checkpointing=true", "stages.0.sample_rate=0.3"]),
        ("zero2_bf16", 8, ["batch.grad_accum_steps=2"]),
        ("zero3_bf16", 64, []),
        pytest.param("zero1_bf16", 2, [], marks=pytest.mark.slow),
        pytest.param("zero1_fp32", 64, ["stages.0.centers=pco"], marks=pytest.mark.slow),
        pytest.param("zero1_bf16", 8, ["batch.grad_accum_steps=2"], marks=pytest.mark.slow),
        pytest.param("zero3_fp32", 64, [], marks=pytest.mark.slow),
    ],
)
def test_a_step_under_deepspeed_holds_and_sends_what_is_planned(config, world_size, changes):
    (counted,) = run_ranks(1, step_under_deepspeed, config, world_size, changes)
    peak, planned, sent, sending = counted
    assert planned == pytest.approx(peak, rel=0.05)
    assert sending == pytest.approx(sent, rel=0.05)


def step_under_deepspeed(group, config, world_size, changes) -> tuple[int, int, int, int]:
    """(peak, planned peak, bytes sent, planned bytes sent) of the rank of ``world_size`` that holds most; the head's are not sent.

    The other ranks are made up: torch's fake process group returns at once, whatever its size.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import model.vit
    from train.engine import build_engine, build_optimizer

    small = [
        "model.name=vit_t",
        "batch.micro_batch_size=16",
        "batch.global_batch_size=null",
        "head.product_dtype=float32",
        "head.chunk_rows=512",
    ]
    cfg = load_run_config(
        ROOT / "train/recipes/lvface_v1.yaml", [*small, "model.activation_checkpointing=false", "stages.0.sample_rate=1.0", *changes]
    )
    ds_config, summary = load_ds_config(ROOT / f"ds_configs/{config}.json", cfg, world_size, "cpu")
    touched = Backbone.of(cfg).touched(world_size)
    rank = 0 if config.startswith("zero3") else touched.index(max(touched))  # in ZeRO 3 all hold alike; the others' answers are rank 0's
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    zero, classes = ZeroSettings.of(ds_config, summary.precision), 1_000 * world_size
    model.vit.accumulate_in_float32 = lambda product, *operands: product(*operands)  # as a GPU does it
    with TensorMemory("cpu") as memory:
        net = build_vit("vit_t", activation_checkpointing=cfg.model.activation_checkpointing)
        engine = build_engine(net, build_optimizer(net, cfg.optimizer), ds_config)
        stage = cfg.stages[0]
        head = PartialFC(512, len(range(0, classes, world_size)), stage.sample_rate, centers=stage.centers, chunk_rows=512, group=None)
        head._ranks = AloneOf(world_size)
        head.set_stage(stage.sample_rate, stage.centers, update_expectation=True)
        images = torch.randn(16, 3, 112, 112)
        for _step in range(2):  # AdamW makes its moments in the first
            memory.restart()
            for _ in range(cfg.batch.accumulation(world_size)):
                labels = torch.randint(1_000, (16,))
                loss = head(engine(images), labels)
                engine.backward(loss)
                del loss
                engine.step()
            head.step(1e-3, 0.1)
    planned = stage_memory(cfg, Backbone.of(cfg), zero, classes, world_size, 0).peak
    sending = step_traffic(Backbone.of(cfg), zero, head_shape(cfg, zero, classes, world_size, 0))
    return (
        memory.peak,
        planned.total - planned.parts["decoded images"],
        memory.sent * (world_size - 1) // world_size,
        sending.gradients + sending.weights,
    )
