"""Signals and dead launchers: the run saves one checkpoint at the next step and ends with a code that says so, and goes on bit for bit."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.ranks import run_ranks
from tests.training import ROOT, check_same_run, free_port, train_on_rank, write_recipe
from train.checkpoint_folder import problem_of
from train.stop import STOPPED

# Every batch takes so long to come that a signal finds the run in the middle of its 8 steps of two batches.
SLOW = {"rank": "all", "place": "data", "call": "every", "fault": "nap"}


def send(number, *who):
    """To processes of the scene: ``launcher`` is what the user started, ``starter`` its child that starts the ranks."""

    def action(scene):
        for name in who:
            os.kill({"launcher": scene.launcher, "starter": scene.starter, 0: scene.pid(0), 1: scene.pid(1)}[name], number)

    return action


TERM, USR1, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL
REQUESTS = {
    "SIGTERM to the launcher": (send(TERM, "launcher"), "the end of the launcher"),
    "SIGTERM to the launcher's child": (send(TERM, "starter"), "SIGTERM"),
    "SIGTERM to rank 1": (send(TERM, 1), "rank 1: SIGTERM"),
    "SIGUSR1 to rank 0": (send(USR1, 0), "rank 0: SIGUSR1"),
    "SIGTERM to everyone": (send(TERM, "launcher", "starter", 0, 1), "SIGTERM"),
    "SIGKILL of the launcher": (send(KILL, "launcher"), "the end of the launcher"),
    "SIGKILL of the launcher and its child": (send(KILL, "launcher", "starter"), "the end of the launcher"),
}


def marks(request):
    """One of them is enough for every change."""
    return [] if request == "SIGTERM to rank 1" else [pytest.mark.slow]


@pytest.mark.fault("{id}", "one checkpoint, exit code 75; continued bit for bit")
@pytest.mark.parametrize("request_", [pytest.param(name, marks=marks(name)) for name in REQUESTS])
def test_a_request_to_stop_ends_in_one_checkpoint_and_the_run_goes_on_from_it(request_, scene, finished):
    action, reason = REQUESTS[request_]
    scene.start(SLOW, checkpoint={"every_steps": 99})
    scene.wait_for_step(2)
    action(scene)
    result = scene.end()
    said = re.search(r"stopped at step (\d) \((.*)\); its checkpoint is complete", result.stdout)
    assert said, result.stdout + result.stderr
    assert reason in said[2]
    assert scene.codes() == {0: STOPPED, 1: STOPPED}
    assert scene.all_gone()
    step = int(said[1])
    assert 2 <= step < 8
    expected = {step, 4} if step > 4 else {step}  # a stage ends at 4
    assert {int(path.name[5:]) for path in scene.output.glob("checkpoints/step_*")} == expected
    assert not (scene.output / "summary.json").exists()
    check_continued(scene, finished)


def check_continued(scene, finished):
    """Started again, it ends as the run that nobody stopped."""
    assert run_ranks(2, train_on_rank, scene.folder / "recipe.yaml", "zero1_fp32.json") == [8, 8]
    check_same_run(scene.output, finished())


@pytest.mark.slow
@pytest.mark.fault("SIGTERM at the {id} of a run", "ends at once, exit code 75; continued bit for bit")
@pytest.mark.parametrize("place", ["start", "end"])
def test_outside_of_training_the_run_ends_at_once(place, scene, finished):
    scene.start({"rank": 0, "place": place, "call": 1, "fault": "sleep"})
    scene.wait_for_call()
    begin = time.monotonic()
    send(TERM, 0)(scene)
    result = scene.end()
    assert time.monotonic() - begin < 10
    assert "rank 0: stopped by SIGTERM" in result.stderr
    assert scene.codes()[0] == STOPPED
    assert scene.all_gone()
    check_continued(scene, finished)


@pytest.mark.slow
@pytest.mark.fault("SIGTERM in a step that does not end", "cut off after grace_s; continued bit for bit")
def test_a_step_that_does_not_end_is_cut_off_after_the_grace_period(scene, finished):
    scene.start({"rank": 1, "place": "data", "call": 11, "fault": "sleep"}, checkpoint={"every_steps": 2, "grace_s": 3})
    scene.wait_for_call()
    begin = time.monotonic()
    send(TERM, 0, 1)(scene)
    result = scene.end()
    assert 2.5 < time.monotonic() - begin < 15
    assert "nothing was saved within checkpoint.grace_s = 3 seconds" in result.stderr
    assert STOPPED in scene.codes().values()
    assert scene.all_gone()
    check_continued(scene, finished)


@pytest.mark.slow
@pytest.mark.fault("SIGUSR1 while a checkpoint is written", "it is finished; continued bit for bit")
def test_a_request_while_a_checkpoint_is_written_lets_it_be_finished(scene, finished):
    scene.start({"rank": 0, "place": "commit", "call": 1, "fault": "nap_long"}, checkpoint={"every_steps": 3})
    scene.wait_for_call()
    send(USR1, 1)(scene)
    result = scene.end()
    assert re.search(r"stopped at step \d \(rank 1: SIGUSR1\)", result.stdout)
    assert (scene.output / "checkpoints/step_00000003/manifest.json").exists()
    assert scene.codes() == {0: STOPPED, 1: STOPPED}
    check_continued(scene, finished)


@pytest.mark.slow
@pytest.mark.fault("SIGTERM while a stage begins", "one checkpoint at a step of it; continued bit for bit")
def test_a_request_while_a_stage_begins_is_heeded_at_its_next_step(scene, finished):
    scene.start({"rank": "all", "place": "stage", "call": 2, "fault": "nap_long"}, checkpoint={"every_steps": 99})
    scene.wait_for_call()
    send(TERM, 0)(scene)
    result = scene.end()
    assert re.search(r"stopped at step [56] \(rank 0: SIGTERM\)", result.stdout), result.stdout + result.stderr
    assert scene.codes() == {0: STOPPED, 1: STOPPED}
    check_continued(scene, finished)


@pytest.mark.slow
@pytest.mark.fault("SIGKILL of rank 0 as it deletes an old checkpoint", "the new one is whole; continued bit for bit")
def test_a_kill_in_a_deletion_leaves_the_new_checkpoint(scene, finished):
    scene.start({"rank": 0, "place": "delete", "call": 2, "fault": "kill"}, checkpoint={"every_steps": 2, "keep_last": 1})
    scene.end()
    assert scene.all_gone()
    assert (scene.output / "checkpoints/latest").read_text() == "step_00000006\n"
    assert problem_of(scene.output / "checkpoints/step_00000006") is None
    check_continued(scene, finished)


@pytest.mark.slow
@pytest.mark.fault("SIGTERM to torchrun", "one checkpoint, exit code 75; continued bit for bit")
def test_torchrun_passes_a_request_on(scene, finished):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m"]
    scene.start(SLOW, launcher=command, checkpoint={"every_steps": 99})
    scene.wait_for_step(2)
    send(TERM, "launcher")(scene)
    result = scene.end()
    assert re.search(r"stopped at step \d \(.*SIGTERM", result.stdout), result.stderr
    assert scene.codes() == {0: STOPPED, 1: STOPPED}
    assert scene.all_gone()
    check_continued(scene, finished)


@pytest.mark.slow
@pytest.mark.fault("Ctrl-C", "exit code 130; continued bit for bit")
def test_ctrl_c_leaves_nothing_torn(scene, finished):
    scene.start(SLOW, checkpoint={"every_steps": 2})
    scene.wait_for_step(3)
    os.killpg(scene.launcher, signal.SIGINT)  # what a terminal does
    scene.end()
    assert 130 in scene.codes().values()
    assert scene.all_gone()
    check_continued(scene, finished)


@pytest.mark.slow
@pytest.mark.fault("SIGKILL of rank 1 under the launcher", "no summary.json, all ranks gone; continued bit for bit")
def test_a_killed_rank_leaves_no_mark_of_success_whatever_the_launcher_says(scene, finished):
    scene.start(SLOW, checkpoint={"every_steps": 2})
    scene.wait_for_step(3)
    send(KILL, 1)(scene)
    scene.end()
    assert not (scene.output / "summary.json").exists()
    assert scene.all_gone()
    assert scene.finish().returncode == 0
    assert (scene.output / "summary.json").exists()
    check_continued(scene, finished)


@pytest.mark.fault("no checkpoint, and resume=required", "refused")
def test_resume_required_refuses_to_begin_at_step_0(shards, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", resume="required")
    command = [sys.executable, "-m", "train", "--config", recipe, "--deepspeed_config", "ds_configs/zero1_fp32.json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no checkpoint to resume from, and resume=required" in result.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*"))
