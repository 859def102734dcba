"""The doctor's checks of ranks together, each with a rank that is wrong and without; and all of it under the launcher."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.training import ROOT, free_port
from train.checks import together
from train.checks.finding import Level
from train.dist import Ranks

OK, WARNING, PROBLEM = Level


def ranks_of(group) -> Ranks:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return Ranks(rank, rank, world_size, world_size, torch.device("cpu"), group)


def check_agreement(group):
    ranks = ranks_of(group)
    (finding,) = together.agreement(ranks, {"torch": "2.13.0", "code": "abc"})
    assert finding.level == OK
    (finding,) = together.agreement(ranks, {"torch": "2.13.0", "code": "old" if ranks.rank == 1 else "abc"})
    assert (finding.level, finding.found) == (PROBLEM, "code: abc on ranks 0, 2, old on rank 1")


def check_all_reduce(group):
    ranks = ranks_of(group)
    assert together.all_reduce(ranks, 1).level == OK
    right = dist.all_reduce

    def wrong(tensor, **options):
        right(tensor, **options)
        if ranks.rank == 2:
            tensor[5] += 1

    dist.all_reduce = wrong
    finding = together.all_reduce(ranks, 1)
    assert (finding.level, finding.found) == (PROBLEM, "gloo adds 3 ranks up wrongly: 1 of 262,144 sums on ranks 2")


def check_links(group):
    ranks = ranks_of(group)

    def timed(ranks, action):
        action()
        return 0.1 if ranks.rank == 2 else 0.01  # seconds of what comes in on that rank

    together._timed = timed
    (finding,) = together.links(ranks, 1)
    host = socket.gethostname()
    assert (finding.level, finding.found) == (WARNING, f"rank 1 ({host}) to rank 2 ({host}): 10.5 MB/s, the median is 105 MB/s")


def check_clocks(group):
    ranks = ranks_of(group)
    assert together.clocks(ranks).level == OK
    ahead = together.clocks(ranks, lambda: time.time() + 90 * (ranks.rank == 2))
    behind = together.clocks(ranks, lambda: time.time() - 90 * (ranks.rank == 1))
    assert (ahead.level, behind.level) == (WARNING, WARNING)
    assert ahead.found.startswith("rank 2 (")
    assert ") is 90.0 s ahead of rank 0 (" in ahead.found
    assert behind.found.startswith("rank 1 (")
    assert ") is 90.0 s behind rank 0 (" in behind.found


def test_ranks_that_run_something_else_are_named():
    run_ranks(3, check_agreement)


def test_a_wrong_sum_is_a_problem():
    run_ranks(3, check_all_reduce)


def test_a_slow_link_is_named():
    run_ranks(3, check_links)


def test_clocks_that_are_off_are_named():
    run_ranks(3, check_clocks)


@pytest.mark.slow
def test_two_ranks_are_checked_together_under_the_launcher(tmp_path):
    (tmp_path / "ext/op").mkdir(parents=True)
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": "", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext")}
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "--module",
        "train",
    ]
    command = [*launcher, "doctor", "--folder", str(tmp_path), "--disk-mib", "1", "--link-mib", "1"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    for words in (
        "ok       packages ",
        "ok       agreement      2 ranks on 1 node have the same versions and code",
        "ok       all-reduce     gloo over 2 ranks: ",
        "ok       clocks ",
    ):
        assert result.stdout.count(words) == 1, result.stdout + result.stderr
    assert " links " in result.stdout  # on a busy machine one of two may be called slow
    assert "terminate called" not in result.stderr
    assert result.returncode == (2 if "\nproblem " in result.stdout else 0)
    (tmp_path / "ext/op/lock").touch()
    os.utime(tmp_path / "ext/op/lock", (0, 0))
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert f"; rm {tmp_path}/ext/op/lock" in result.stdout  # found by the first rank of the node alone
    assert result.returncode == 2
