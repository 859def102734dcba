"""One flipped bit in what all ranks share is found before it is overwritten, and named; healthy training has nothing to report."""

import hashlib
import re
import socket

import pytest
import torch
import torch.distributed as dist

from model.norm_margin import AdaFace
from model.partial_fc import PartialFC
from model.vit import build_vit
from tests.ranks import run_ranks
from tests.training import ROOT, losses, packed_faces, train_on_rank, write_recipe
from train.config import RunConfig
from train.dist import RankError, Ranks
from train.ds_config import load_ds_config
from train.engine import build_engine, build_optimizer
from train.replicas import odd_ranks, replicas, require_equal

D, CLASSES, BATCH = 16, 12, 4
FLIPS = [("pos_embed", 0), ("blocks.2.attn.qkv.weight", 14), ("feature.3.bias", 7), ("head.bias", 31), ("head.norm_std", 3)]  # bits
TOLD = {2: "rank 0 on {0}, rank 1 on {0}: different values of {1}, and no majority", 3: "rank 1 on {0}: other values .*, of {1}[.]"}
TO_DO = "the newest checkpoint; if the same rank differs again, have its"


def flip(tensor, bit):
    """Of the last element, in place; a second time it is as it was."""
    tensor.view(-1)[-1:].view(torch.uint8)[bit // 8] ^= 1 << bit % 8


def odd_by_bytes(tensors, ranks):
    """The names of those whose bytes are not the same on all ranks."""
    content = {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    every = ranks.gather({name: hashlib.sha256(data).hexdigest() for name, data in content.items()})
    return [name for name in content if len({digests[name] for digests in every}) > 1]


def check(group, precision):
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    ranks = Ranks(rank, rank, world_size, world_size, torch.device("cpu"), group)
    cfg = RunConfig.model_validate(
        {"output": "unused", "data": {"path": "unused"}, "batch": {"micro_batch_size": BATCH}, "stages": [{"name": "only", "steps": 9}]}
    )
    for stage in (1, 2, 3):
        ds_config, _ = load_ds_config(ROOT / f"ds_configs/zero{stage}_{precision}.json", cfg, world_size, "cpu")
        torch.manual_seed(0)
        net = build_vit("vit_xxt", embedding_size=D)
        engine = build_engine(net, build_optimizer(net, cfg.optimizer), ds_config)
        head = PartialFC(D, CLASSES, 1.0, AdaFace(), 16.0, group=group, loss="uniface")
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + rank)
            embeddings = engine(torch.randn(BATCH, 3, 112, 112, generator=generator))
            engine.backward(head(embeddings, torch.randint(0, CLASSES, (BATCH,), generator=generator)))
            shared = replicas(engine, head)
            require_equal(step + 1, shared, ranks)
            assert odd_by_bytes(shared, ranks) == []
            engine.step()
            head.step(1e-2, 0.1)
        shared = replicas(engine, head)
        whole = {name for name, parameter in engine.module.named_parameters() if stage < 3 or parameter.ds_numel <= 100_000}
        assert whole | {"head.bias", "head.bias_exp_avg", "head.norm_mean", "head.curricular_t", "head.draws"} < shared.keys()
        assert ("feature.0.weight" in shared) == (stage < 3), "ZeRO 3 shares out what is large"
        assert all(shared[name].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision] for name in whole)
        for name, bit in FLIPS:
            if rank == 1:
                flip(shared[name], bit)
            assert list(odd_ranks(shared, ranks)) == odd_by_bytes(shared, ranks) == ([name] if world_size > 1 else [])
            if world_size > 1:
                expected = TOLD[world_size].format(re.escape(socket.gethostname()), re.escape(name))
                with pytest.raises(RankError, match=f"^step 7: {expected}.*{TO_DO}"):
                    require_equal(7, shared, ranks)
            if rank == 1:
                flip(shared[name], bit)
            require_equal(8, shared, ranks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_flipped_bit_on_one_rank_is_found_and_named(world_size, precision):
    run_ranks(world_size, check, precision, timeout_s=250)


def train_with_a_flip(group, recipe, at_step):
    """A bit of rank 1's weights flips before the first forward pass of a step. Returns the error, or the step reached."""
    from train import build

    build_run = build.build_run

    def build_and_flip(*args):
        run = build_run(*args)
        prepare = run.head.prepare

        def prepare_and_flip(labels):
            if run.step + 1 == at_step and run.ranks.rank == 1 and run.engine.micro_steps % 2 == 0:
                flip(dict(run.engine.module.named_parameters())["feature.0.weight"].data, 3)
            return prepare(labels)

        run.head.prepare = prepare_and_flip
        return run

    build.build_run = build_and_flip
    try:
        return train_on_rank(group, recipe, "zero1_fp32.json")
    except RankError as error:
        return str(error)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_faces(tmp_path_factory.mktemp("replicas"))


@pytest.mark.parametrize(("every", "at_step", "stops"), [(3, 6, True), (4, 6, False), (None, 6, False)])
def test_a_run_stops_on_all_ranks_before_the_step_is_taken(every, at_step, stops, shards, tmp_path):
    """Accumulating two micro-batches; what flips in a step that is not looked at is overwritten at its end."""
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", guard={"replica_check_steps": every})
    ends = run_ranks(2, train_with_a_flip, recipe, at_step)
    if not stops:
        assert ends == [8, 8]
        return
    assert ends[0] == ends[1]
    assert ends[0].startswith(f"step {at_step}: rank 0 on ")
    assert "different values of feature.0.weight, and no" in ends[0]
    assert list(losses(tmp_path / "run")) == list(range(1, at_step))
