"""A run of two ranks under Prometheus: one reads slowly, then dies; the run goes on and ends in order."""

import os
import signal
import subprocess
import sys
import urllib.request

from tests.faults.scene import Scene
from tests.prometheus import Prometheus, dashboard_queries, promtool
from tests.training import ROOT, free_port, packed_faces


def test_prometheus_sees_all_that_the_dashboard_asks_for_a_straggler_a_death_and_an_end_in_order(tmp_path):
    shards, port = packed_faces(tmp_path / "data"), free_port()
    pairs = ["--pairs", str(tmp_path / "pairs.txt"), "--folds", "5", "--pairs-per-fold", "10"]
    heldout = [str(tmp_path / "heldout"), "--identities", "20", "--images", "4", "--first-identity", "500", *pairs]
    subprocess.run([sys.executable, "-m", "data_pipeline", "synthetic", *heldout], cwd=ROOT, check=True, timeout=120)
    recipe = {
        "stages": [{"name": "early", "steps": 100_000, "sample_rate": 0.5, "update_expectation": True}],
        "eval": {"images": str(tmp_path / "heldout"), "pairs": str(tmp_path / "pairs.txt"), "every_checkpoint": True},
        "checkpoint": {"every_steps": 10, "keep_last": 2},
        "metrics": {"port": port, "log_every": 1},
    }
    with Scene(tmp_path, shards) as scene, Prometheus(tmp_path / "prometheus", scene.output) as prometheus:
        scene.start({"rank": 1, "place": "data", "call": "every", "fault": "nap"}, **recipe)
        prometheus.wait_for_data(dashboard_queries("run"), finite=False)  # on a CPU the model's utilization is not known
        prometheus.wait_for("every rule's evaluation", lambda: {rule["health"] for rule in prometheus.rules()} == {"ok"})
        assert {labels["rank"] for labels, up in prometheus.query('up{job="lvface"}') if up} == {"0", "1"}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lint = promtool("check", "metrics", input=answer.read().decode())
        assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")

        prometheus.wait_for("the straggler", lambda: prometheus.alerts().get("LvfaceStraggler", {}).get("rank") == "1")
        assert "LvfaceDataBound" in prometheus.alerts()

        os.kill(scene.pid(1), signal.SIGKILL)
        scene.end()
        prometheus.wait_for("an alert about all ranks", lambda: "LvfaceRunDown" in prometheus.alerts())

        scene.start(**recipe)
        prometheus.wait_for("the run's return", lambda: prometheus.query('sum(up{job="lvface"}) == 2 and on () lvface_restarts > 0'))
        os.kill(scene.launcher, signal.SIGTERM)
        scene.end()
        assert set(scene.codes().values()) == {75}
        prometheus.wait_for("the end of its targets", lambda: not prometheus.query('up{job="lvface"}'))
        down = {"LvfaceRunDown", "LvfaceRankDown"}  # for a moment the targets were there and the ranks were not
        prometheus.wait_for("the end of alerts about ranks", lambda: not down & prometheus.alerts().keys())
