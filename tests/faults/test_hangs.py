"""Two ranks from the command line, one of which stands still or dies: every process goes, and one line names rank and phase."""

import re
from pathlib import Path

import pytest

from tests.launch import errors
from train.watchdog import HUNG

DEADLINES = {"data_s": 3, "step_s": 5, "checkpoint_s": 200, "start_s": 200, "end_s": 200}


@pytest.fixture
def sabotage(scene):
    """Trains two ranks of which one goes wrong."""

    def run(rank, place, call, fault, **deadlines):
        scene.start({"rank": rank, "place": place, "call": call, "fault": fault}, watchdog={**DEADLINES, **deadlines})
        result = scene.end()
        result.codes, result.all_gone = scene.codes(), scene.all_gone()
        return result

    return run


def stacks(folder: Path, rank: int) -> str:
    return (folder / f"run/stacks/rank_{rank:05d}.txt").read_text()


@pytest.mark.slow
@pytest.mark.fault("a rank hangs while it reads", "rank and phase named, all stacks, exit code 3")
def test_a_rank_without_data_is_named_with_its_phase_and_every_rank_tells_its_stacks(sabotage, tmp_path):
    result = sabotage(1, "data", 5, "sleep")
    (error,) = errors(result)
    assert re.search(r"rank 1 is stuck in phase data after step 2, for \d+ s, at sleep \(faults/sabotage.py:\d+\)", error)
    assert re.search(r"rank 0 is in phase head, for \d+ s; watchdog.data_s allows 3 s\.", error)
    assert "in sleep" in stacks(tmp_path, 1)
    assert "in prepare" in stacks(tmp_path, 0)
    for rank in (0, 1):
        assert stacks(tmp_path, rank) in result.stderr  # in one piece
    assert result.codes == {0: HUNG, 1: HUNG}
    assert result.returncode == HUNG
    assert result.all_gone


@pytest.mark.fault("SIGSTOP of rank {id}", "named, all ranks gone, exit code 3")
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])  # rank 0 keeps the store through which the ranks speak
def test_a_stopped_process_is_named_and_does_not_stay_behind(rank, sabotage, tmp_path):
    result = sabotage(rank, "head", 5, "stop")
    (error,) = errors(result)
    assert re.search(rf"rank {rank} is stuck: its process was stopped \(SIGSTOP, or a suspended job\) for \d+ s;", error)
    assert re.search(rf"rank {1 - rank} is in phase head, for \d+ s; watchdog.step_s allows 5 s\.", error)
    assert result.codes == {0: HUNG, 1: HUNG}
    assert result.returncode == HUNG
    assert result.all_gone


@pytest.mark.slow
@pytest.mark.fault("a library holds the interpreter of rank 1", "named by the other, all ranks gone")
def test_a_rank_whose_interpreter_is_held_is_named_by_the_other(sabotage, tmp_path):
    result = sabotage(1, "data", 5, "hold_the_interpreter")
    (error,) = errors(result)
    assert "rank 1 is stuck: its process runs, but no Python in it" in error
    assert result.codes == {0: HUNG}
    assert result.all_gone


@pytest.mark.slow
@pytest.mark.fault("a rank hangs before the first step", "named, exit code 3")
def test_a_rank_that_hangs_before_the_first_step_is_named(sabotage, tmp_path):
    result = sabotage(1, "start", 1, "sleep", start_s=20)
    (error,) = errors(result)
    assert re.search(
        r"rank 1 is stuck in phase start, for \d+ s, at sleep .*; rank 0 is in phase start, .* watchdog.start_s allows 20 s", error
    )
    assert result.codes == {0: HUNG, 1: HUNG}
    assert result.all_gone


@pytest.mark.slow
@pytest.mark.fault("a rank hangs after the last step", "named, exit code 3")
def test_a_rank_that_hangs_after_the_last_step_is_named(sabotage, tmp_path):
    result = sabotage(0, "end", 1, "sleep", end_s=4)
    (error,) = errors(result)
    assert "rank 0 is stuck in phase end after step 8" in error
    assert result.codes == {0: HUNG, 1: HUNG}
    assert result.all_gone


@pytest.mark.slow
@pytest.mark.fault("SIGKILL of rank 1: what the other says", "one line, exit code 1")
def test_a_rank_that_is_killed_is_missed_at_once_and_without_a_traceback(sabotage, tmp_path):
    result = sabotage(1, "data", 5, "kill")
    (error,) = errors(result)
    assert re.search(r"rank 0: rank 1 is dead, noticed in phase head after step 2 \(.*Connection reset by peer.*\);", error)
    assert "Traceback" not in result.stderr
    assert result.codes == {0: 1}
    assert result.returncode != 0
    assert result.all_gone
