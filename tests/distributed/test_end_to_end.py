"""The whole path from the command line: draw, pack, train on 2 ranks through both stages, scrape, evaluate."""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.launch import launch_process
from tests.training import ROOT, free_port, write_recipe


def command(*arguments):
    result = subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def scrape(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def value(text, series):
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(series + " ")), None)


def test_faces_become_a_verified_model_and_every_rank_serves_metrics(tmp_path):
    command("data_pipeline", "synthetic", tmp_path / "faces", "--identities", 24, "--images", 10)
    command("data_pipeline", "pack", tmp_path / "faces", tmp_path / "shards", "--shards", 3)
    heldout = ["--identities", 20, "--images", 4, "--first-identity", 500]
    pairs = ["--pairs", tmp_path / "pairs.txt", "--folds", 5, "--pairs-per-fold", 10]
    command("data_pipeline", "synthetic", tmp_path / "heldout", *heldout, *pairs)

    port = free_port()
    run = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tmp_path / "shards",
        run,
        stages=[
            {"name": "early", "epochs": 4, "sample_rate": 0.5, "update_expectation": True},
            {"name": "stable", "epochs": 4, "centers": "pco", "update_expectation": True},
        ],
        eval={"images": str(tmp_path / "heldout"), "pairs": str(tmp_path / "pairs.txt"), "every_checkpoint": True},
        checkpoint={"every_steps": 20, "keep_last": 1, "keep_best": 1},
        metrics={"port": port, "log_every": 1},
    )
    process = launch_process(recipe, ranks=2, ds_config=ROOT / "ds_configs/zero1_bf16.json")
    seen = {0: "", 1: ""}  # the last answer of each rank
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            found = json.loads((run / "prometheus_targets.json").read_text())
        for rank in seen:
            seen[rank] = scrape(port + rank) or seen[rank]
        time.sleep(0.05)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not (run / "stacks").exists(), "the watchdog raised an alarm"
    assert [target["labels"]["rank"] for target in found] == ["0", "1"]
    assert [target["targets"] for target in found] == [[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]
    assert not (run / "prometheus_targets.json").exists(), "Prometheus would take ranks that have ended for ranks that are down"
    assert "TCPStore" not in errors  # torch's word for ranks that leave in the wrong order

    for rank, text in seen.items():
        assert value(text, "lvface_samples_total") > 0, f"rank {rank}"
        for part in ("data_wait", "head", "forward", "backward", "comm", "optimizer", "checkpoint"):
            assert value(text, f'lvface_step_part_seconds_total{{part="{part}"}}') > 0, part
        for kind in ("start", "train", "checkpoint"):
            assert value(text, f'lvface_run_time_seconds_total{{kind="{kind}"}}') > 0, kind
        for series in ("loss", "learning_rate", "loss_scale", "sample_rate", "epoch", "step", "hardest_negative_cosine"):
            assert value(text, f"lvface_{series}") is not None
        assert value(text, 'lvface_memory_bytes{kind="used"}') < value(text, 'lvface_memory_bytes{kind="total"}')

    scores = {int(step): float(score) for step, score in re.findall(r"checkpoint \S+/step_(\d+) \(.*, score (\S+)\)", output)}
    assert scores.keys() == {20, 28, 40, 56}
    best = max(scores, key=lambda step: (scores[step], step))
    assert {int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")} == {best, 56}
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["checkpoint_score"] == pytest.approx(scores[line["checkpoint_step"]], abs=1e-4)
    assert line["checkpoint_blocked_seconds"] < line["checkpoint_write_seconds"]

    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 8 * (240 // (2 * 8 * 2))  # whole global batches alone
    assert summary["stage_losses"]["early"]["end"] < summary["stage_losses"]["early"]["start"]
    assert summary["images_per_second"] > 0
    assert "ETA" in output
    assert "stage stable" in output
    assert f"report in {run / 'report.html'}" in output
    assert (run / "report.html").read_text().count("data:image/png;base64,") == 2 * len(list((run / "curves").glob("*.png"))) > 0
    for text in ("throughput", "early", "stable", "accuracy", f"http://127.0.0.1:{port}/metrics", summary["checkpoint"]):
        assert text in output.split("done")[-1]
    # The same model by the evaluation command: the same accuracy. 60 steps teach little, so only that it is no constant is checked.
    command(
        "eval",
        "pairs",
        "--model",
        run,
        "--images",
        tmp_path / "heldout",
        "--pairs",
        tmp_path / "pairs.txt",
        "--json",
        tmp_path / "out.json",
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["accuracy"]["mean"] == pytest.approx(
        summary["pairs"]["accuracy"], abs=0.011
    )  # one pair: the device may differ in rounding
    assert report["accuracy"]["mean"] > 0.5
