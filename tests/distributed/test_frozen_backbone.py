"""A frozen stage moves the class centers and nothing of the backbone, ends as one fate on all ranks, and goes on bit for bit."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from model.class_shard import ClassShard, initial_centers
from model.collectives import Collectives
from model.partial_fc import PartialFC
from model.vit import build_vit
from tests.ranks import run_ranks
from tests.reference import adamw_reference, head_reference, relative_error
from tests.training import ROOT, check_same_run, given_weights, packed_faces, train_on_rank, write_recipe
from train.backbone import FrozenBackbone, TrainedBackbone
from train.config import RunConfig
from train.ds_config import load_ds_config

# The head alone, the whole, the head again, the whole again; the first two share an epoch of 3 steps. A checkpoint follows every step.
FREEZES = {
    "stages": [
        {"name": "head", "steps": 2, "freeze_backbone": True, "schedule": {"lr": 5e-3}},
        {"name": "whole", "steps": 2, "sample_rate": 0.5, "update_expectation": True},
        {"name": "head_again", "steps": 2, "centers": "pco", "freeze_backbone": True},
        {"name": "whole_again", "steps": 2, "centers": "pco"},
    ],
    "checkpoint": {"every_steps": 1, "keep_last": 9},
    "schedule": {},
}
CONFIGS = ("zero1_fp32.json", pytest.param("zero2_bf16.json", marks=pytest.mark.slow), "zero3_bf16.json")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_faces(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The override that names the weights that runs begin with, and their file."""
    return given_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def finished(shards, given, tmp_path_factory):
    """``finished(ds_config)``: the output of an uninterrupted run of FREEZES on two ranks; each is trained once."""
    folder, runs = tmp_path_factory.mktemp("finished"), {}

    def get(ds_config):
        if ds_config not in runs:
            output = folder / ds_config.removesuffix(".json")
            recipe = write_recipe(output.with_suffix(".yaml"), shards, output, **FREEZES)
            assert run_ranks(2, train_on_rank, recipe, ds_config, [given[0]]) == [8, 8]
            runs[ds_config] = output
        return runs[ds_config]

    return get


def saved(output, step, rank):
    """What a checkpoint holds of a rank's backbone and of its head, flat."""
    folder = output / f"checkpoints/step_{step:08d}"
    state = torch.load(folder / f"rank_{rank:05d}.pt", weights_only=True)
    backbone = {
        **{f"{name} {kind}": value for name, piece in state["engine"]["pieces"].items() for kind, value in piece.items()},
        **{f"buffer {name}": value for name, value in state["buffers"].items()},
        **{f"ema {name}": value for name, value in state["ema"]["buffers"].items()},
        **{name: state["engine"][name] for name in ("optimizer", "groups", "loss_scaler", "counts")},
        "ema updates": state["ema"]["updates"],
    }
    return backbone, state["head"]


def moved(before, after):
    """The names of what differs, bit for bit."""
    assert before.keys() <= after.keys()
    same = {name: torch.equal(value, after[name]) if torch.is_tensor(value) else value == after[name] for name, value in before.items()}
    return {name for name, equal in same.items() if not equal}


@pytest.mark.parametrize("ds_config", CONFIGS)
def test_a_frozen_stage_moves_the_class_centers_and_nothing_of_the_backbone(ds_config, finished):
    for rank in (0, 1):
        states = [saved(finished(ds_config), step, rank) for step in range(1, 9)]
        for (before, head), (after, next_head), step in zip(states, states[1:], range(2, 9), strict=False):
            if step in (2, 5, 6):  # step 1 has no checkpoint before it
                assert moved(before, after) == set()
                assert before.keys() == after.keys()
            else:
                assert {"buffer feature.1.running_mean", "ema updates"} <= moved(before, after)
                assert {name for name in before if name.endswith(" master")} <= moved(before, after)
            assert "weight" in moved(head, next_head)


def test_a_frozen_first_stage_leaves_the_backbone_as_it_was_given(finished, given):
    weights = load_file(given[1])
    for rank in (0, 1):
        backbone, _ = saved(finished("zero1_fp32.json"), 2, rank)
        for name, piece in backbone.items():
            if name.endswith(" master"):
                start = backbone[name.replace("master", "start")]
                assert torch.equal(piece, weights[name.removesuffix(" master")].flatten()[start : start + len(piece)])
                assert torch.equal(piece, backbone[name.replace("master", "mean")])
        assert torch.equal(backbone["buffer feature.3.running_var"], weights["feature.3.running_var"])
        assert not any("exp_avg" in name for name in backbone)


def test_a_frozen_stage_is_logged_without_a_gradient_of_the_backbone(finished):
    lines = list(map(json.loads, (finished("zero1_fp32.json") / "metrics.jsonl").read_text().splitlines()))
    assert [line["gradient_norm"] is None for line in lines] == [True, True, False, False, True, True, False, False]
    for line in lines:
        assert line["head_gradient_norm"] > 0
        assert line["images"] == 32
        assert line["images_per_second"] > 0
    assert lines[0]["operations"] < lines[2]["operations"] / 2
    assert [line["learning_rate"] for line in lines[:2]] == pytest.approx([5e-3, 2.5e-3])
    assert [line["learning_rate"] for line in lines[2:]] == pytest.approx([1e-3 * (1 - step / 6) for step in range(6)])


# In the frozen stage; in the save at its end; in the trained one after it; in the frozen one after that, and in the save at its end.
KILLS = [(1, "within", 2), (0, "save", 2), (1, "within", 3), (1, "within", 6), (0, "save", 6)]
FAST_KILLS = [(1, "within", 2), (0, "save", 6)]


@pytest.mark.parametrize(
    ("kill", "ds_config"),
    [
        *(pytest.param(kill, "zero1_fp32.json", marks=() if kill in FAST_KILLS else pytest.mark.slow) for kill in KILLS),
        *(pytest.param(kill, "zero3_bf16.json", marks=pytest.mark.slow) for kill in KILLS),
    ],
    ids=str,
)
def test_a_run_killed_in_or_around_a_frozen_stage_continues_bit_for_bit(kill, ds_config, finished, shards, given, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", **FREEZES)
    with pytest.raises(AssertionError, match=r"ranks ended without a traceback|failed"):
        run_ranks(2, train_on_rank, recipe, ds_config, [given[0]], kill)
    assert run_ranks(2, train_on_rank, recipe, ds_config, [given[0]]) == [8, 8]
    check_same_run(tmp_path / "run", finished(ds_config))


CLASSES, D, B, LR, DECAY = 11, 8, 6, 1e-2, 0.1


class Engine(nn.Module):
    """A backbone with all that a frozen stage must switch off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, D), nn.BatchNorm1d(D), nn.Dropout(0.5))

    def forward(self, images):
        return self.layers(images)


def micro_batch(step, micro, rank):
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(B, 3, 2, 2, generator=generator), torch.randint(0, CLASSES, (B,), generator=generator)


def frozen_step(backbone, head, rank, step, poison=False):
    for micro in range(2):
        images, labels = micro_batch(step, micro, rank)
        if poison and (rank, micro) == (1, 0):
            images[0, 0, 0, 0] = math.nan
        assert not backbone.ends_step
        backbone.backward(head(backbone(images), labels))
        assert backbone.ends_step == (micro == 1)
        backbone.step()
    return backbone.was_step_applied()


def check_steps(group):
    rank, engine = dist.get_rank(group), Engine()
    before = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    head = PartialFC(D, CLASSES, 1.0, (1.0, 0.0, 0.2), 16.0, group=group)
    backbone = FrozenBackbone(engine, Collectives(group), 2)
    for step in (1, 2):
        assert frozen_step(backbone, head, rank, step)
        head.step(LR, DECAY)
        centers = head.weight.clone()
        assert not frozen_step(backbone, head, rank, step, poison=True)  # on both ranks
        head.discard()
        assert torch.equal(head.weight, centers)
    assert math.isnan(backbone.gradient_norm())
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state_dict().items())
    assert all(parameter.grad is None for parameter in engine.parameters())
    return head.class_start, head.weight


def reference_centers():
    engine, centers = Engine().eval().double(), initial_centers(ClassShard(CLASSES, 0, 1), D, 0).double()
    history = []
    for step in (1, 2):
        gradient = 0
        for micro in range(2):
            images, labels = (torch.cat(parts) for parts in zip(*(micro_batch(step, micro, rank) for rank in (0, 1)), strict=True))
            with torch.no_grad():
                embeddings = engine(images.double())
            found = head_reference(embeddings, centers, labels, margin=(1.0, 0.0, 0.2), scale=16.0, margin_gradient="exact")
            gradient = gradient + found.centers_grad / 2
        history.append(dict(enumerate(gradient)))
        centers = adamw_reference(initial_centers(ClassShard(CLASSES, 0, 1), D, 0), history, lr=LR, weight_decay=DECAY)
    return centers


def test_frozen_steps_move_the_centers_as_the_reference_does_and_skip_as_one():
    parts = run_ranks(2, check_steps)
    assert [start for start, _ in parts] == [0, 6]
    assert relative_error(torch.cat([rows for _, rows in parts]), reference_centers()) < 1e-5


def recipe(**stage):
    stages = [{"name": "a", "steps": 1, "update_expectation": True}, {"name": "b", "steps": 1, "freeze_backbone": True, **stage}]
    return RunConfig.model_validate({"output": "o", "data": {"path": "d"}, "stages": stages})


def test_a_frozen_stage_that_could_move_nothing_at_all_is_refused():
    with pytest.raises(ValueError, match=r"stages\.1\.freeze_backbone: true leaves nothing to train"):
        recipe(centers="replace")
    assert recipe(centers="replace", update_expectation=True).stages[1].freeze_backbone


def build():
    """A backbone and its DeepSpeedEngine; one rank."""
    from train.engine import build_engine, build_optimizer

    cfg = recipe()
    ds_config, _ = load_ds_config(ROOT / "ds_configs/zero1_fp32.json", cfg, 1, "cpu")
    net = build_vit("vit_xxt", embedding_size=D)
    return net, build_engine(net, build_optimizer(net, cfg.optimizer), ds_config)


def counts_after_going_back(group):
    """Of an optimizer that counts in its parameter groups, as apex's and DeepSpeed's do on a GPU: after 7 steps, and back at none."""
    from train.engine_state import engine_state, load_engine_state

    _, engine = build()
    state = engine_state(engine)
    pieces = {name: {kind: value.clone() for kind, value in piece.items() if kind != "start"} for name, piece in state["pieces"].items()}
    groups = engine.optimizer.optimizer.param_groups
    for group in groups:
        group["step"] = 7
    load_engine_state(engine, state, lambda kind, name, start, stop: pieces[name][kind])
    return [group.get("step") for group in groups]


def test_a_run_that_goes_back_into_a_frozen_first_stage_counts_the_backbone_s_steps_from_none():
    assert run_ranks(1, counts_after_going_back) == [[None, None]]


def modes_around_an_evaluation(group):
    """Whether the module trains, as each stage begins and after an evaluation in it; one rank."""
    from eval.embedder import module_embedder

    net, engine = build()
    modes = []
    for stage in (lambda: FrozenBackbone(engine, Collectives(group)), lambda: TrainedBackbone(engine, None)):
        stage()
        modes.append(net.training)
        module_embedder(engine, source="the engine")(torch.zeros(2, 112, 112, 3, dtype=torch.uint8))
        modes.append(net.training)
    return modes


def test_an_evaluation_leaves_a_frozen_backbone_frozen_and_another_in_training():
    assert run_ranks(1, modes_around_an_evaluation) == [[False, False, True, True]]
