"""Alerts, dashboard and Prometheus' configuration: checked by promtool, and by a real Prometheus that scrapes two exporters."""

import json
import urllib.request

import pytest
import yaml

from tests.fake_ranks import FakeRun
from tests.prometheus import FOLDER, Prometheus, alert_queries, dashboard_queries, metric_names, promtool
from train.metric_table import TABLE
from train.metrics import TARGETS
from train.observability.dashboard import FILE, as_json

KNOWN = {spec.name for spec in TABLE}


def read_yaml(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.fixture
def run(tmp_path):
    """Two ranks to scrape, of a run with a blank in its name."""
    (tmp_path / "some run").mkdir()
    with FakeRun(tmp_path / "some run", 2) as run:
        yield run


@pytest.mark.parametrize(
    "arguments", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"), ("check", "config", "prometheus.yml")]
)
def test_promtool_finds_nothing_wrong(arguments):
    *command, name = arguments
    result = promtool(*command, FOLDER / name)
    assert result.returncode == 0, result.stdout + result.stderr


def test_promtool_finds_nothing_wrong_with_the_metrics_that_ranks_serve(run):
    with urllib.request.urlopen(f"http://127.0.0.1:{run.ranks[0].port}/metrics", timeout=10) as answer:
        result = promtool("check", "metrics", input=answer.read().decode())
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_every_alert_is_shown_to_fire_and_to_be_silent():
    fires, silent = set(), set()
    for case in read_yaml("alerts_test.yml")["tests"]:
        for check in case.get("alert_rule_test", []):
            (fires if check["exp_alerts"] else silent).add(check["alertname"])
    alerts = {rule["alert"] for group in read_yaml("alerts.yml")["groups"] for rule in group["rules"] if "alert" in rule}
    assert fires == silent == alerts


def test_alerts_that_never_fire_fail_their_tests(tmp_path):
    rules = read_yaml("alerts.yml")
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    for rule in alerts:
        rule["expr"] = "vector(1) == 0"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "alerts_test.yml").write_text((FOLDER / "alerts_test.yml").read_text())
    result = promtool("test", "rules", tmp_path / "alerts_test.yml")
    assert result.returncode != 0
    assert {rule["alert"] for rule in alerts if f"alertname: {rule['alert']}," in result.stdout + result.stderr} == {
        rule["alert"] for rule in alerts
    }


def test_alerts_say_how_bad_it_is_who_it_is_and_what_to_do():
    for group in read_yaml("alerts.yml")["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
                assert {"summary", "action"} == rule["annotations"].keys(), rule["alert"]
                assert "$labels.run" in rule["annotations"]["summary"], rule["alert"]
                if rule["alert"] != "LvfaceRunDown":  # that is all of them
                    assert "rank }}" in rule["annotations"]["summary"], rule["alert"]
                    assert "node }}" in rule["annotations"]["summary"], rule["alert"]


def test_alerts_and_dashboard_name_only_metrics_that_exist():
    queries = {**dict(alert_queries()), **dashboard_queries("run")}
    assert {name: unknown for name, query in queries.items() if (unknown := metric_names(query) - KNOWN)} == {}


def test_the_dashboard_is_what_its_module_makes():
    assert FILE.read_text() == as_json()


def test_panels_have_ids_and_places_of_their_own_and_ask_the_chosen_prometheus_about_the_chosen_run():
    panels = json.loads(FILE.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"], panel["title"]
            assert all('run="$run"' in target["expr"] for target in panel["targets"]), panel["title"]


def test_a_real_prometheus_answers_every_query_of_the_dashboard_and_evaluates_every_rule(run, tmp_path):
    with Prometheus(tmp_path / "prometheus", run.output) as prometheus:
        run.announce()  # after its start: it must find the file by itself
        prometheus.wait_for_data(dashboard_queries("some run"), finite=True)
        for _, expression in alert_queries():
            prometheus.query(expression)
        prometheus.wait_for("every rule's evaluation", lambda: {rule["health"] for rule in prometheus.rules()} == {"ok"})
        prometheus.wait_for("no alert", lambda: not prometheus.alerts())  # at the first scrape no step has been taken yet

        run.ranks[1].close()
        prometheus.wait_for("an alert", prometheus.alerts)
        labels = prometheus.alerts()["LvfaceRankDown"]
        assert (labels["run"], labels["rank"], labels["node"]) == ("some run", "1", "node1")

        (run.output / TARGETS).unlink()  # an end in order
        prometheus.wait_for("the end of all alerts", lambda: not prometheus.alerts())


def test_docker_mounts_what_is_there_where_prometheus_and_grafana_look_for_it():
    services = read_yaml("docker-compose.yml")["services"]
    mounts = {}
    for service in services.values():
        for volume in service["volumes"]:
            source, target = volume.removesuffix(":ro").rsplit(":", 1)
            mounts[target] = source
            if source.startswith("./"):
                assert (FOLDER / source).is_file(), source
    (config,) = (flag.partition("=")[2] for flag in services["prometheus"]["command"] if flag.startswith("--config.file="))
    assert mounts[config] == "./prometheus.yml"
    folder = config.rpartition("/")[0]
    assert [mounts[f"{folder}/{name}"] for name in read_yaml("prometheus.yml")["rule_files"]] == ["./alerts.yml"]
    (job,) = read_yaml("prometheus.yml")["scrape_configs"]
    (targets,) = job["file_sd_configs"][0]["files"]
    assert mounts[f"{folder}/{targets.rpartition('/')[0]}"].startswith("${LVFACE_RUN:?")
    assert mounts["/etc/grafana/provisioning/datasources/lvface.yml"] == "./grafana/datasources.yml"
    assert mounts["/etc/grafana/provisioning/dashboards/lvface.yml"] == "./grafana/dashboards.yml"
    (provider,) = read_yaml("grafana/dashboards.yml")["providers"]
    assert mounts[f"{provider['options']['path']}/lvface.json"] == "./dashboard.json"
    (source,) = read_yaml("grafana/datasources.yml")["datasources"]
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in services["prometheus"]["command"]
    assert source["jsonData"]["timeInterval"] == read_yaml("prometheus.yml")["global"]["scrape_interval"]
