import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.ranks import run_ranks
from tests.training import free_port
from train.dist import RankError, Ranks, lost_connection, process_group, read_ranks
from train.engine import build_engine


def check_together(group):
    rank = dist.get_rank(group)
    ranks = Ranks(rank, rank, 2, 2, torch.device("cpu"), group)
    assert ranks.together(lambda: rank * 10) == rank * 10

    def fails_on(*which):
        if rank in which:
            raise ValueError("no such folder")

    with pytest.raises(RankError, match=r"^rank 1: no such folder$"):
        ranks.together(lambda: fails_on(1))
    with pytest.raises(RankError, match=r"^no such folder$"):
        ranks.together(lambda: fails_on(0, 1))
    assert ranks.broadcast(f"from {rank}") == "from 0"


def test_an_error_on_one_rank_is_raised_on_all_and_names_it():
    run_ranks(2, check_together)


def timeouts_with_an_engine(group, zero_stage, port):
    """Of every process group once DeepSpeed has made its own, in seconds."""
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    with process_group(read_ranks(), timedelta(seconds=77)):
        before = len(distributed_c10d._world.pg_map)
        backbone = torch.nn.Linear(4, 4)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": zero_stage}}
        build_engine(backbone, torch.optim.AdamW(backbone.parameters()), config)
        assert len(distributed_c10d._world.pg_map) > before, "DeepSpeed makes no group of its own any more"
        backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
        return [backend.options._timeout.total_seconds() for backend in backends]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_every_process_group_has_the_timeout_those_of_deepspeed_too(zero_stage):
    for timeouts in run_ranks(2, timeouts_with_an_engine, zero_stage, free_port()):
        assert set(timeouts) == {77.0}


def test_only_the_word_of_a_collective_counts_as_a_lost_connection():
    gloo = (
        "[/src/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:13520: Connection reset by peer. This is typically caused by a bug."
    )
    assert lost_connection(RuntimeError(gloo)) == "Read error [127.0.0.1]:13520: Connection reset by peer"
    assert lost_connection(dist.DistNetworkError("port 29500 is taken (EADDRINUSE)")) is None
    assert lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
