"""A real Prometheus that scrapes the ranks of a run as a user's would, and what may be asked of it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.training import ROOT, free_port

FOLDER = ROOT / "train/observability"
_LIMIT_S = 120


def tool(name: str) -> str:
    """The path of ``prometheus`` or ``promtool``; without it the test skips."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed (apt-get install prometheus): nothing was checked with it")


def promtool(*arguments: str | Path, input: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([tool("promtool"), *arguments], input=input, capture_output=True, text=True, timeout=60)


def dashboard_queries(run: str) -> dict[str, str]:
    """Title of the panel and letter of the query -> its expression for ``run``."""
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    queries = ((panel["title"], target) for panel in panels for target in panel.get("targets", []))
    return {f"{title} {target['refId']}": target["expr"].replace("$run", run) for title, target in queries}


def metric_names(expression: str) -> set[str]:
    """The project's own metrics that an expression names, histograms as a whole; not what rules record."""
    return {re.sub("_bucket$", "", name) for name in re.findall(r"(?<![\w:])lvface_\w+", expression)}


class Prometheus:
    """A server that watches ``output`` by the project's own configuration, every half second.

    ``with Prometheus(folder, output) as prometheus:`` its data lie in ``folder``; it is gone after the block.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        for job in config["scrape_configs"]:
            for discovery in job["file_sd_configs"]:
                discovery["refresh_interval"] = "1s"
        folder.mkdir()
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(FOLDER / "alerts.yml", folder)
        (folder / "run").symlink_to(output)
        self._folder, self._url = folder, f"http://127.0.0.1:{(port := free_port())}"
        self._command = [
            tool("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]

    def __enter__(self) -> Prometheus:
        self._log = (self._folder / "log").open("w")
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self.wait_for("its answer", self._ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)
        self._log.close()

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of every series of an instant query, which must be valid."""
        found = self._get("query", query=expression)
        if found["resultType"] == "scalar":
            return [({}, float(found["result"][1]))]
        return [(series["metric"], float(series["value"][1])) for series in found["result"]]

    def rules(self) -> list[dict]:
        """Every rule with what became of its newest evaluation."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def alerts(self) -> dict[str, dict[str, str]]:
        """Name -> labels, of what fires or is about to; of several of one name one."""
        return {alert["labels"]["alertname"]: alert["labels"] for alert in self._get("alerts")["alerts"]}

    def wait_for(self, what: object, happened: Callable[[], object]) -> None:
        """Until ``happened()`` is true; fails if it does not become so, or Prometheus ends. ``what``: as which the failure speaks of it."""
        end = time.monotonic() + _LIMIT_S
        while not happened():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < end, f"no sign of {what}"
            time.sleep(0.2)

    def wait_for_data(self, queries: dict[str, str], finite: bool) -> None:
        """Until each query has a series, with ``finite`` one whose value is finite. Fails with the names of those that have none."""
        missing = dict(queries)

        def found() -> bool:
            for name, expression in list(missing.items()):
                if any(not finite or math.isfinite(value) for _, value in self.query(expression)):
                    del missing[name]
            return not missing

        self.wait_for(missing, found)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def _get(self, what: str, **parameters: str) -> dict:
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None


def alert_queries() -> Iterator[tuple[str, str]]:
    """Name and expression of every alert and every recorded series."""
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
