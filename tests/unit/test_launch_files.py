"""The launch examples: scripts run with stand-ins for what a cluster has, the Kubernetes file against the API's own model."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from tests.training import ROOT
from train.config import load_run_config
from train.ds_config import load_ds_config
from train.stop import STOPPED

LAUNCH = ROOT / "train/launch"
SCRIPTS = [LAUNCH / "node.sh", LAUNCH / "slurm.sh"]
# A rank: writes down its place and arguments, and ends as EXIT_n says, n its rank, or 75 at SIGTERM or SIGUSR1.
RANK = """#!/usr/bin/env python3
import json, os, signal, sys, time
place = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: (time.sleep(0.2), sys.exit(75)))
path = f"{os.environ['NOTES']}/{place['RANK']}"
with open(path + ".new", "w") as file:
    json.dump([place, sys.argv[1:]], file)
os.rename(path + ".new", path)
code = os.environ.get("EXIT_" + place["RANK"])
if code is None:
    time.sleep(60)
sys.exit(int(code))
"""
# srun: two nodes of two tasks here; its exit code is the highest of theirs.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >> "$NOTES/srun"; shift; done
for task in 0 1 2 3; do SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > highest)) && highest=$code; done
exit "${highest:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$NOTES/scontrol"
case "$1 $2" in
    "show hostnames") printf 'node3\\nnode7\\n' ;;
    "show job") echo "JobId=$3 JobName=lvface JobState=$JOB_STATE Reason=None" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job on such a cluster; NOTES is where the stand-ins write."""
    for name, text in {"python": RANK, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "notes").mkdir()
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[3,7]", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
    env = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    return env | slurm | {"SLURM_CPUS_PER_TASK": "8", "PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}


def notes(cluster, name):
    with open(f"{cluster['NOTES']}/{name}") as file:
        return file.read()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: only the syntax was checked")
    subprocess.run(["shellcheck", script], check=True)


# Slurm


def slurm(cluster, state="RUNNING", **codes):
    env = cluster | {f"EXIT_{rank}": str(codes.get(f"rank{rank}", 0)) for rank in range(4)} | {"JOB_STATE": state}
    return subprocess.run([LAUNCH / "slurm.sh", "--config", "a recipe.yaml", "output=RUN"], env=env, check=False).returncode


def test_slurm_tasks_become_ranks(cluster):
    assert slurm(cluster) == 0
    for rank in range(4):
        place, arguments = json.loads(notes(cluster, rank))
        assert place == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "node3",
            "MASTER_PORT": "23456",
        }
        assert arguments == ["-m", "train", "--config", "a recipe.yaml", "output=RUN", "checkpoint.grace_s=110"]


@pytest.mark.parametrize(
    ("codes", "state", "code", "requeued"),
    [
        ({}, "RUNNING", 0, False),
        ({"rank2": STOPPED, "rank0": STOPPED}, "RUNNING", STOPPED, True),
        ({"rank2": STOPPED}, "CANCELLED", STOPPED, False),
        ({"rank1": 2}, "RUNNING", 2, False),
        ({"rank1": STOPPED, "rank2": 137}, "RUNNING", 137, False),
    ],
    ids=["done", "stopped", "cancelled", "wrong recipe", "killed"],
)
def test_slurm_puts_the_job_back_if_it_was_stopped_on_request_and_not_otherwise(cluster, codes, state, code, requeued):
    assert slurm(cluster, state, **codes) == code
    assert ("requeue 123456" in notes(cluster, "scontrol").splitlines()) == requeued


def test_slurm_signals_before_the_grace_period_is_needed():
    text = (LAUNCH / "slurm.sh").read_text()
    before = int(re.search(r"^#SBATCH --signal=USR1@(\d+)$", text, re.MULTILINE)[1])
    grace = float(re.search(r"checkpoint\.grace_s=(\d+)$", text, re.MULTILINE)[1])
    assert grace < before
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)


# A node


def start_node(cluster, **codes):
    place = {"NODE_RANK": "1", "NODES": "2", "RANKS_HERE": "2", "MASTER_ADDR": "first"}
    env = cluster | place | {f"EXIT_{name[4:]}": str(code) for name, code in codes.items()}
    return subprocess.Popen([LAUNCH / "node.sh", "--config", "x y.yaml"], env=env, stderr=subprocess.PIPE, text=True)


def test_a_node_starts_its_ranks_and_ends_with_the_highest_exit_code(cluster):
    assert start_node(cluster, rank2=0, rank3=0).wait(30) == 0
    assert [json.loads(notes(cluster, rank)) for rank in (2, 3)] == [
        [
            {
                "RANK": str(2 + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": "4",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "first",
                "MASTER_PORT": "29500",
            },
            ["-m", "train", "--config", "x y.yaml"],
        ]
        for local in range(2)
    ]
    assert start_node(cluster, rank2=3, rank3=1).wait(30) == 3
    assert start_node(cluster, rank2=0, rank3=2).wait(30) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_node_passes_signals_on_and_waits_for_its_ranks(cluster, number):
    node = start_node(cluster)
    end = time.monotonic() + 30
    while not all(os.path.exists(f"{cluster['NOTES']}/{rank}") for rank in (2, 3)):
        assert time.monotonic() < end
        time.sleep(0.02)
    node.send_signal(number)
    assert node.wait(30) == STOPPED


def test_a_node_says_what_it_was_not_told(cluster):
    result = subprocess.run([LAUNCH / "node.sh"], env=cluster | {"NODE_RANK": "0"}, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "NODES: how many nodes" in result.stderr


# Kubernetes and Docker


@pytest.fixture(scope="module")
def manifests():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return service, job


def problems_of(value, kind, client, path):
    """Keys that the API does not know, and values of another type than its own."""
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        assert isinstance(value, list), path
        return [problem for i, item in enumerate(value) for problem in problems_of(item, match[1], client, f"{path}[{i}]")]
    if kind.startswith("dict("):
        return [] if isinstance(value, dict) else [f"{path}: no mapping"]
    model = getattr(client, kind, None)
    if model is None:
        expected = {"str": str, "int": int, "bool": bool}.get(kind, object)
        return [] if isinstance(value, expected) else [f"{path}: {value!r} is no {kind}"]
    names = {key: name for name, key in model.attribute_map.items()}
    found = [f"{path}.{key}: unknown" for key in value if key not in names]
    for key in value.keys() & names.keys():
        found += problems_of(value[key], model.openapi_types[names[key]], client, f"{path}.{key}")
    return found


def test_the_api_knows_every_field(manifests):
    client = importlib.import_module("kubernetes.client")
    service, job = manifests
    assert problems_of(service, "V1Service", client, "Service") == []
    assert problems_of(job, "V1Job", client, "Job") == []
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 130
    assert problems_of(job, "V1Job", client, "Job") == ["Job.spec.template.spec.terminationGracePeriod: unknown"]
    del job["spec"]["template"]["spec"]["terminationGracePeriod"]


def test_a_pod_has_time_for_its_checkpoint_and_a_recipe_that_is_good(manifests):
    pod = manifests[1]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = dict(argument[2:].split("=") for argument in container["args"] if argument.startswith("--"))
    cfg = load_run_config(ROOT / given["config"], [argument for argument in container["args"] if not argument.startswith("--")])
    assert cfg.checkpoint.grace_s < pod["terminationGracePeriodSeconds"]
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    world_size = int(env["NODES"]) * int(env["RANKS_HERE"])
    load_ds_config(ROOT / given["deepspeed_config"], cfg, world_size, "cuda")
    assert container["command"] == ["train/launch/node.sh"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(env["RANKS_HERE"])
    assert {"NODE_RANK", "MASTER_ADDR"} <= env.keys()
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}


def test_pods_find_each_other_and_a_stop_is_no_failure(manifests):
    service, job = manifests
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    actions = {code: rule["action"] for rule in spec["podFailurePolicy"]["rules"] for code in rule.get("onExitCodes", {}).get("values", [])}
    assert actions == {2: "FailJob", STOPPED: "Ignore"}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_the_image_is_pinned_and_holds_what_the_examples_start():
    text = (LAUNCH / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.\d\d$", text, re.MULTILINE)
    assert "pip install --no-cache-dir -r requirements.txt" in text
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert not [name for name in ignored if name.startswith(("train", "model", "data_pipeline", "eval", "ds_configs"))]
