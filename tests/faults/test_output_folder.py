"""The output folder of a run is its own."""

import json
import os
import re
import signal
import time

import pytest

from tests.launch import errors, launch, launch_process
from tests.training import losses, write_recipe


@pytest.mark.fault("two runs on one output", "the second refused, the first unharmed")
def test_a_second_run_on_an_output_is_refused_and_the_first_is_unharmed(shards, tmp_path):
    """The first stands still meanwhile, so that it cannot be over before the second one asks."""
    output = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, output)
    first = launch_process(recipe)
    try:
        deadline = time.monotonic() + 100
        while not (output / "metrics.jsonl").exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        second = launch(recipe, "seed=1", "resume=never")
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    finally:
        os.kill(first.pid, signal.SIGCONT)
        _, stderr = first.communicate(timeout=120)
    assert second.returncode == 2
    expected = rf"^error: {re.escape(str(output))}: another run is writing here \(pid {first.pid} on .* since .*\); end it first"
    assert re.search(expected, errors(second)[0])
    assert first.returncode == 0, stderr
    assert json.loads((output / "summary.json").read_text())["steps"] == 8
    assert list(losses(output)) == list(range(1, 9))
    assert "seed: 0" in (output / "recipe.yaml").read_text()
