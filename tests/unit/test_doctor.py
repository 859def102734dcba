"""The doctor: each check on a state that was made bad, and on one that was not; its lines and exit codes."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline import graph
from tests.training import ROOT, free_port, write_recipe
from train import doctor
from train.checks import machine, recipe, software, together
from train.checks.finding import Level
from train.config import load_run_config
from train.lock import OutputLock

OK, WARNING, PROBLEM = Level
COMMAND = [sys.executable, "-m", "train", "doctor"]
QUICK = ["--disk-mib", "1", "--link-mib", "1"]


def install(folder, monkeypatch, name, text):
    """A package that this process and those that it starts find first."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def executable(folder, monkeypatch, name, text):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def only(findings):
    (finding,) = findings
    return finding


# Software


def test_packages_are_compared_with_the_pins(tmp_path):
    (tmp_path / "requirements.txt").write_text("# a comment\nnumpy==0.1  # old\nno-such-package-here==1.0\npytest>=1\n")
    wrong, missing, right = software.packages(tmp_path / "requirements.txt")
    assert (wrong.level, missing.level, right.level) == (WARNING, PROBLEM, OK)
    assert wrong.found == f"numpy is {np.__version__}, tested is ==0.1"
    assert missing.found == "no-such-package-here is not installed, ==1.0 is asked for"
    assert "pip install -r requirements.txt" in missing.cure


def test_an_old_python_is_a_problem(monkeypatch):
    assert software.python().level == OK
    monkeypatch.setattr(software, "_OLDEST_PYTHON", (4, 0))
    assert software.python().level == PROBLEM


def test_the_apex_of_pypi_is_told_from_nvidias(tmp_path, monkeypatch):
    monkeypatch.setattr(software, "find_spec", lambda name: None)
    assert (software.apex(False).level, software.apex(True).level) == (OK, PROBLEM)
    monkeypatch.undo()
    install(tmp_path / "pypi", monkeypatch, "apex", "from pyramid import nothing")
    assert (software.apex(False).level, software.apex(True).level) == (WARNING, PROBLEM)
    assert "pip uninstall apex" in software.apex(True).cure
    install(tmp_path / "nvidia", monkeypatch, "apex", "")
    (tmp_path / "nvidia/apex/optimizers.py").write_text("class FusedAdam: ...")
    assert "No module named 'amp_C'" in software.apex(True).found
    install(tmp_path / "nvidia", monkeypatch, "amp_C", "")
    assert software.apex(True).level == OK


def test_dali_decodes_or_says_why_not(monkeypatch):
    assert software.dali(None).level == OK

    def broken(*_):
        raise RuntimeError("no CUDA driver\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(graph, "run", broken)
        finding = software.dali(None)
        assert (finding.level, finding.found) == (PROBLEM, "does not decode on the CPU: no CUDA driver")
    with monkeypatch.context() as patch:
        patch.setattr(graph, "tensor", lambda images, right=graph.tensor: 255 - right(images))
        assert "differs from Pillow's by 255 levels" in software.dali(None).found
        assert software.dali(None).level == PROBLEM
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nvidia.dali", None)
        assert software.dali(None).level == PROBLEM


def test_a_compiler_is_missed_where_something_compiles(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    executable(tmp_path / "good", monkeypatch, "c++", "exit 0")
    assert software.compiler([]).level == OK
    executable(tmp_path / "bad", monkeypatch, "c++", "echo 'Python.h: No such file' >&2; exit 1")
    finding = software.compiler(["model.compile: true"])
    assert finding.level == PROBLEM
    assert "does not compile against Python's headers (Python.h: No such file), which model.compile: true would do" in finding.found
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert (software.compiler([]).level, software.compiler(["model.compile: true"]).level) == (WARNING, PROBLEM)


def test_nvcc_is_missed_where_deepspeed_would_compile_its_optimizer(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert (software.nvcc(False).level, software.nvcc(True).level) == (OK, PROBLEM)
    executable(tmp_path / "bin", monkeypatch, "nvcc", "")
    assert software.nvcc(True).level == OK


def test_a_lock_of_a_dead_compilation_is_told_from_a_live_and_a_young_one(tmp_path):
    assert only(software.compile_locks(tmp_path)).level == OK
    folder = tmp_path / "py311_cpu/deepspeed_shm_comm"
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    assert only(software.compile_locks(tmp_path)).level == WARNING
    later = time.time() + 2 * 3600
    finding = only(software.compile_locks(tmp_path, later))
    assert (finding.level, finding.cure) == (PROBLEM, f"rm {lock}")
    with lock.open():
        assert "is compiling" in only(software.compile_locks(tmp_path, later)).found


# One node

SMI = """cat <<END
0, NVIDIA H100 80GB HBM3, 580.95.05, 9.0, 81559, 4
1, NVIDIA H100 80GB HBM3, 580.95.05, 9.0, 81559, 70000
2, Tesla V100-SXM2-32GB, 580.95.05, 7.0, 32768, 4
END"""


def levels(findings):
    return [finding.level for finding in findings]


def test_gpus_are_told_with_what_is_wrong_with_them(tmp_path, monkeypatch):
    executable(tmp_path / "bin", monkeypatch, "nvidia-smi", SMI)
    fine, busy, old, usable = machine.gpus(machine.TorchDevices(3, "13.0"), 3)
    assert levels([fine, busy, old, usable]) == [OK, WARNING, WARNING, OK]
    assert fine.found == "0: NVIDIA H100 80GB HBM3, 81559 MiB, 4 in use"
    assert "another process" in busy.found
    assert "no bfloat16" in old.found
    assert "fp16" in old.cure
    for torch_devices, ranks, level, words in (
        (machine.TorchDevices(0, None), 1, PROBLEM, "torch is a CPU build"),
        (machine.TorchDevices(0, "13.0"), 1, PROBLEM, "torch for CUDA 13.0 can use none of 3 GPUs under driver 580.95.05"),
        (machine.TorchDevices(3, "13.0"), 4, PROBLEM, "4 ranks share 3 GPUs"),
        (machine.TorchDevices(3, "13.0", kept_off=True), 1, WARNING, "DS_ACCELERATOR=cpu keeps ranks off 3 GPUs"),
    ):
        *_, last = machine.gpus(torch_devices, ranks)
        assert (last.level, last.found[: len(words)]) == (level, words)


def test_a_driver_that_does_not_answer_is_a_problem_and_no_driver_none(tmp_path, monkeypatch):
    executable(tmp_path / "bin", monkeypatch, "nvidia-smi", "echo 'NVIDIA-SMI has failed because'; exit 9")
    finding = only(machine.gpus(machine.TorchDevices(0, "13.0"), 1))
    assert (finding.level, finding.found) == (PROBLEM, "nvidia-smi fails: NVIDIA-SMI has failed because")
    monkeypatch.setenv("PATH", "/nowhere")
    assert levels(machine.gpus(machine.TorchDevices(0, None), 1)) == [OK]
    assert levels(machine.gpus(machine.TorchDevices(2, "13.0"), 1)) == [WARNING]


def test_a_container_s_small_shared_memory_is_a_problem_for_ranks_on_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(total=64 << 20, free=64 << 20))
    several, one, on_cpu = (machine.shared_memory(tmp_path, *case) for case in ((8, True), (1, True), (8, False)))
    assert levels([several, one, on_cpu]) == [PROBLEM, WARNING, WARNING]
    assert "67.1 MB free of 67.1 MB" in several.found
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(total=8 << 30, free=8 << 30))
    assert machine.shared_memory(tmp_path, 8, True).level == OK
    monkeypatch.undo()
    assert machine.shared_memory(tmp_path / "gone", 8, True).level == PROBLEM


def test_a_low_limit_of_open_files_is_a_problem_of_many_ranks_or_shards():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        assert levels([machine.open_files(8), machine.open_files(64), machine.open_files(8, shards=1000)]) == [OK, PROBLEM, PROBLEM]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert machine.open_files(64).found.endswith("a rank may need 1,264")


def test_taken_ports_are_named():
    port = free_port()
    assert machine.ports("127.0.0.1", port, 2).level == OK
    with socket.socket() as other:
        other.bind(("127.0.0.1", port + 1))
        other.listen()
        finding = machine.ports("127.0.0.1", port, 2)
    assert finding.level == WARNING
    assert finding.found.startswith(f"{port + 1} of 127.0.0.1:{port} to {port + 1} taken")
    assert levels([machine.ports("192.0.2.1", port, 1), machine.ports("127.0.0.1", 65535, 2), machine.ports("", 0, 8)]) == [
        PROBLEM,
        PROBLEM,
        OK,
    ]


def test_the_disk_is_measured_where_the_output_will_be(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_SLOW_DISK", 0)
    finding = machine.disk(tmp_path / "run/of/tomorrow", 5)
    assert finding.level == OK
    assert finding.found.startswith(f"{tmp_path}: writes ")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine, "_SLOW_DISK", float("inf"))
    assert machine.disk(tmp_path, 1).level == WARNING


def test_a_disk_that_is_full_or_returns_other_bytes_is_a_problem(tmp_path, monkeypatch):
    written = bytearray(1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(machine.os, "urandom", lambda size: written)
        patch.setattr(machine.os, "posix_fadvise", lambda *_: written.__setitem__(7, 1))  # between writing and reading
        assert "gave back other bytes" in machine.disk(tmp_path, 1).found
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
        finding = machine.disk(tmp_path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (finding.level, finding.found) == (PROBLEM, f"{tmp_path}: 1 MiB cannot be written (File too large)")


# The recipe


@pytest.fixture
def cfg(packed_people, tmp_path):
    def load(*overrides):
        return load_run_config(write_recipe(tmp_path / "recipe.yaml", packed_people, tmp_path / "run"), overrides)

    return load


def test_data_are_opened_and_read(cfg, packed_people, tmp_path):
    finding = recipe.data(cfg().data)
    assert (finding.level, finding.found) == (
        OK,
        f"{packed_people}: 29 images, 6 identities to train on, 3 shards; 29 records read, none is damaged",
    )
    assert recipe.count_shards(packed_people) == 3
    for override, words in (
        (f"data.path={tmp_path}/gone", f"data.path: {tmp_path}/gone is not there"),
        (f"data.path={tmp_path}", str(tmp_path)),
        ("data.num_classes=50", f"{packed_people}: 29 images, 6 identities to train on, 3 shards; the recipe says data.num_classes: 50"),
    ):
        finding = recipe.data(cfg(override).data)
        assert (finding.level, finding.found[: len(words)]) == (PROBLEM, words)
    assert recipe.count_shards(tmp_path) == 0


def test_a_damaged_record_is_named(cfg, packed_people, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", packed_people, copy], check=True)
    shard = next(copy.glob("*.rec"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    finding = recipe.data(cfg(f"data.path={copy}").data)
    assert finding.level == WARNING
    assert f"of 29 records that were read 1 are damaged, such as {shard}: record at offset" in finding.found


def test_an_output_that_is_in_use_or_does_not_suit_resume_is_a_problem(cfg):
    assert recipe.output(cfg()).level == OK
    assert not cfg().output.exists()
    assert recipe.output(cfg("resume=required")).level == PROBLEM
    lock = OutputLock(cfg().output, print)
    finding = recipe.output(cfg())
    assert finding.level == PROBLEM
    assert f"another run is writing there (pid {os.getpid()} on " in finding.found
    lock.close()
    (cfg().output / "checkpoints").mkdir()
    (cfg().output / "checkpoints/latest").write_text("step_00000003\n")
    assert "has come to step_00000003 and would be continued" in recipe.output(cfg()).found
    assert levels([recipe.output(cfg()), recipe.output(cfg("resume=required")), recipe.output(cfg("resume=never"))]) == [OK, OK, PROBLEM]
    (cfg().output / "checkpoints/latest").write_text("../elsewhere\n")
    assert recipe.output(cfg()).level == WARNING


# Ranks; those that need several are in tests/distributed/test_doctor.py


def test_slow_links_are_compared_with_their_like():
    hosts = ["a", "a", "b", "b"]  # links to each rank from the one before it: b to a, within a, a to b, within b
    within, between = together.slow_links(hosts, [1e9, 2e10, 1e9, 2e10])
    assert levels([within, between]) == [OK, OK]
    within, between = together.slow_links(hosts, [1e9, 2e10, 1e8, 2e10])
    assert levels([within, between]) == [OK, WARNING]
    assert between.found == "rank 1 (a) to rank 2 (b): 100 MB/s, the median is 550 MB/s"


def test_the_checksum_of_the_code_changes_with_it(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.py").write_text("1")
    before = together.what_runs_here(tmp_path)
    (tmp_path / "train/a.py").write_text("2")
    after = together.what_runs_here(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"code"}


# From the command line


def test_a_check_that_breaks_is_a_problem_and_every_line_names_its_node(capsys):
    report = doctor.Report("node7", speaks=True)
    report.run("x", lambda: 1 / 0)
    report.run("y", lambda: machine.ports("192.0.2.1", 9400, 1))
    broken, unusable = capsys.readouterr().out.splitlines()
    assert broken.startswith("node7  problem  x              this check failed: ZeroDivisionError: division by zero; ")
    assert unusable.startswith("node7  problem  ports          cannot listen on 192.0.2.1:9400: ")
    assert report.counts == {OK: 0, WARNING: 0, PROBLEM: 2}


def run(*arguments, **environment):
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": "", **environment}
    return subprocess.run([*COMMAND, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_the_doctor_runs_without_a_recipe_and_leaves_nothing(tmp_path):
    result = run(*QUICK, "--folder", tmp_path)
    lines = result.stdout.splitlines()
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warning", "problem"}
    problems = sum(line.startswith("problem") for line in lines)
    assert lines[-1].startswith(f"{problems} problem")
    assert result.returncode == (2 if problems else 0), result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_stale_lock_makes_the_exit_code_2(tmp_path):
    (tmp_path / "ext/op").mkdir(parents=True)
    lock = tmp_path / "ext/op/lock"
    lock.touch()
    os.utime(lock, (0, 0))
    result = run(*QUICK, "--folder", tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "ext"))
    assert result.returncode == 2
    assert f"; rm {lock}" in result.stdout


def test_a_recipe_that_does_not_fit_the_json_is_a_problem(cfg, tmp_path):
    cfg()
    result = run(*QUICK, "--config", tmp_path / "recipe.yaml", "--deepspeed_config", "ds_configs/zero1_fp16.json", "data.path=gone")
    assert result.returncode == 2
    assert "problem  deepspeed      fp16.enabled: fp16 needs a GPU" in result.stdout
    assert "problem  data           data.path: gone is not there" in result.stdout


@pytest.mark.parametrize("argument", ["data.path=SHARDS", "--deepspeed_config=ds_configs/zero1_bf16.json"])
def test_what_only_a_recipe_gives_a_meaning_is_refused_without_one(argument):
    result = run(argument)
    assert result.returncode == 2
    assert "need --config" in result.stderr


def test_ranks_that_do_not_come_are_a_problem_within_the_timeout(tmp_path):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    result = run(*QUICK, "--folder", tmp_path, "--timeout-s", 2, MASTER_PORT=str(free_port()), **place)
    assert result.returncode == 2
    assert "problem  ranks          rank 0 of 2 cannot work with the others: Timed out" in result.stdout
