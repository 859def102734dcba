import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from train.dist import RankError, Ranks


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
