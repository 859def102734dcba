"""Two nodes, simulated on this machine: each started by itself, as on a cluster. The run is that of one node, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import ROOT, check_same_run, final_state, free_port, losses, train_on_rank, write_recipe
from train.stop import STOPPED

CONFIG = "zero1_fp32.json"


def start(commands, recipe):
    """A process per node, each with one core: how many there are decides on the threads, and those on the order of sums."""
    cores = sorted(os.sched_getaffinity(0))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": ""}
    configs = ["--config", recipe, "--deepspeed_config", ROOT / "ds_configs" / CONFIG]
    return [
        subprocess.Popen(
            [*map(str, command), *map(str, configs)],
            cwd=ROOT,
            env={**environment, **place},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda node=node: os.sched_setaffinity(0, [cores[node % len(cores)]]),
        )
        for node, (command, place) in enumerate(commands)
    ]


def end(nodes):
    """Exit code and output of each."""
    try:
        said = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [node.returncode for node in nodes], said


@pytest.mark.slow
def test_two_nodes_of_a_hostfile_train_as_one_node_does(shards, finished, tmp_path):
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", tmp_path / "hosts", "--no_ssh"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    recipe = write_recipe(tmp_path / "two.yaml", shards, tmp_path / "two")
    codes, said = end(start([([*launcher, "--node_rank", node, "--module", "train"], {}) for node in range(2)], recipe))
    assert codes == [0, 0], "\n".join(said)
    assert (tmp_path / "two/summary.json").exists()
    check_same_run(tmp_path / "two", finished(CONFIG))


@pytest.mark.slow
@pytest.mark.fault("SIGTERM to one of two nodes", "one checkpoint, exit code 75 on both; continued bit for bit")
def test_a_signal_to_one_node_stops_both_and_they_go_on(shards, tmp_path):
    """Under train/launch/node.sh, which a container starts."""
    stages = [{"name": "only", "steps": 60, "sample_rate": 0.5}]  # long enough for a signal to find it
    changes = {"stages": stages, "checkpoint": {"every_steps": 99}}
    recipe = write_recipe(tmp_path / "two.yaml", shards, tmp_path / "two", **changes)
    place = {"NODES": "2", "RANKS_HERE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    commands = [([ROOT / "train/launch/node.sh"], {**place, "NODE_RANK": str(node)}) for node in range(2)]
    nodes, log = start(commands, recipe), tmp_path / "two/metrics.jsonl"
    limit = time.monotonic() + 120
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < limit
        assert nodes[0].poll() is None, nodes[0].communicate()[0]
        time.sleep(0.01)
    nodes[1].send_signal(signal.SIGTERM)
    codes, said = end(nodes)
    assert codes == [STOPPED, STOPPED], "\n".join(said)
    assert "(rank 1: SIGTERM)" in said[0]
    assert len(list(tmp_path.glob("two/checkpoints/step_*"))) == 1
    codes, said = end(start(commands, recipe))
    assert codes == [0, 0], "\n".join(said)

    one = write_recipe(tmp_path / "one.yaml", shards, tmp_path / "one", **changes)
    assert run_ranks(2, train_on_rank, one, CONFIG) == [60, 60]
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    for rank in range(2):
        mine, theirs = final_state(tmp_path / "two", rank), final_state(tmp_path / "one", rank)
        assert not [name for name, value in theirs.items() if not torch.equal(mine[name], value)]
