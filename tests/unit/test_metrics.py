"""The metrics table, a real exporter scraped over HTTP, the JSON lines and the phase timer."""

import contextlib
import json
import math
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import train.metrics
from train.config import ConfigError
from train.metrics import PHASES, TABLE, BuildInfo, Metrics, PhaseTimer, StepRecord, metrics_table

HOST = "127.0.0.1"


def record(**changes) -> StepRecord:
    values = {
        "step": 20, "epoch": 1.5, "stage": 1, "stage_name": "stable", "sample_rate": 0.5, "loss": 3.25, "target_cosine": 0.4,
        "target_cosine_square": 0.2,
        "learning_rate": 1e-3, "gradient_norm": 2.0, "head_gradient_norm": 0.5, "loss_scale": 1.0, "bad_records": 2,
        "images": 640, "steps": 10,
        "skipped_steps": 1, "images_per_second": 100.0, "step_seconds": {phase: 0.25 for phase in PHASES}, "eta_seconds": 60.0,
        "target_cosine_smoothed": 0.3, "expectation_cosine": 0.5, "expectation_classes": 9.0, "center_expectation_cosine": 0.8,
        "expectation_drift": 0.01, "curricular_t": 0.2, "uniface_bias": 7.0, "norm_mean": 20.0, "norm_std": 3.0,
        "checkpoint_step": 10.0, "checkpoint_blocked_seconds": 0.1, "checkpoint_write_seconds": 2.0, "checkpoint_free_bytes": 1e12,
        "checkpoint_score": 0.9,
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture
def open_metrics(request):
    """Metrics that are closed when the test ends."""

    def build(jsonl_path=None, port=0, rank=0, local_rank=0) -> Metrics:
        metrics = Metrics(jsonl_path, HOST, port, rank, local_rank, BuildInfo(world_size=2, zero_stage=1, precision="bf16"))
        request.addfinalizer(metrics.close)
        return metrics

    return build


def scrape(port: int) -> dict[str, list]:
    """Sample name -> samples, as a Prometheus server reads them."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return {name: [sample for sample in samples if sample.name == name] for name in {sample.name for sample in samples}}


def test_names_are_unique_legal_and_in_base_units():
    names = [spec.name for spec in TABLE]
    assert len(set(names)) == len(names)
    for spec in TABLE:
        assert re.fullmatch(r"lvface_[a-z]+(_[a-z]+)*", spec.name)
        assert spec.name.endswith("_total") == (spec.kind == "counter")
        assert not re.search(r"_(ms|milliseconds|minutes|hours|percent|kilo\w+)$", spec.name)
        assert not {"step", "path", "rank"} & set(spec.labels)


def test_every_field_of_a_record_is_exported_once():
    fed = [spec.field for spec in TABLE if spec.field]
    assert sorted([*fed, "stage_name"]) == sorted(StepRecord.__dataclass_fields__)


def test_the_documentation_table_lists_every_metric():
    rows = metrics_table().splitlines()[2:]
    assert len(rows) == len(TABLE)
    assert rows[0].startswith("| `lvface_images_total` | counter | images | ")


def test_a_scrape_shows_every_metric_of_the_table_and_nothing_else(open_metrics):
    metrics = open_metrics(port=free_port())
    metrics.record_step(record())
    samples = scrape(metrics.port)
    assert set(samples) == {spec.name for spec in TABLE}
    assert samples["lvface_loss"][0].value == 3.25
    assert {s.labels["phase"]: s.value for s in samples["lvface_step_seconds"]} == {phase: 0.25 for phase in PHASES}
    assert samples["lvface_build_info"][0].labels == {"world_size": "2", "zero_stage": "1", "precision": "bf16"}


def test_counters_start_at_zero_and_add_up_while_gauges_replace(open_metrics):
    metrics = open_metrics(port=free_port())
    before = scrape(metrics.port)
    assert before["lvface_images_total"][0].value == 0
    assert "lvface_loss" not in before
    metrics.record_step(record())
    metrics.record_step(record(loss=2.0, step=30))
    after = scrape(metrics.port)
    assert after["lvface_images_total"][0].value == 1280
    assert after["lvface_steps_total"][0].value == 20
    assert after["lvface_skipped_steps_total"][0].value == 2
    assert after["lvface_loss"][0].value == 2.0
    assert after["lvface_step"][0].value == 30


def test_only_the_current_stage_is_exported(open_metrics):
    metrics = open_metrics(port=free_port())
    metrics.record_step(record(stage=0, stage_name="early"))
    metrics.record_step(record(stage=1, stage_name="stable"))
    (stage,) = scrape(metrics.port)["lvface_stage"]
    assert (stage.labels, stage.value) == ({"name": "stable"}, 1.0)


def test_a_loss_that_is_not_finite_reaches_prometheus_as_it_is(open_metrics):
    metrics = open_metrics(port=free_port())
    metrics.record_step(record(loss=math.nan))
    assert math.isnan(scrape(metrics.port)["lvface_loss"][0].value)


def test_each_local_rank_has_its_own_port(open_metrics, monkeypatch):
    wanted = []

    def listen(port, addr, registry):
        wanted.append(port)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(train.metrics, "start_http_server", listen)
    with pytest.raises(ConfigError, match=rf"cannot listen on {HOST}:9403: Permission denied"):
        open_metrics(port=9400, local_rank=3)
    assert wanted == [9403]


def test_an_occupied_port_is_passed_over_with_a_warning_that_names_the_port_used(open_metrics, caplog):
    with socket.socket() as squatter:
        squatter.bind((HOST, 0))
        squatter.listen()
        taken = squatter.getsockname()[1]
        metrics = open_metrics(port=taken)
        assert taken < metrics.port < taken + train.metrics.PORTS_TO_TRY
        assert f"port {taken} is taken: metrics are at http://{HOST}:{metrics.port}/metrics" in caplog.text
        assert "lvface_build_info" in scrape(metrics.port)


def test_no_free_port_at_all_is_an_error(open_metrics, monkeypatch):
    monkeypatch.setattr(train.metrics, "PORTS_TO_TRY", 1)
    with socket.socket() as squatter:
        squatter.bind((HOST, 0))
        squatter.listen()
        with pytest.raises(ConfigError, match=r"metrics\.port: no free port"):
            open_metrics(port=squatter.getsockname()[1])


def test_port_zero_means_no_exporter(open_metrics):
    assert open_metrics(port=0).port is None


def test_close_frees_the_port_and_may_be_called_twice(open_metrics):
    metrics = open_metrics(port=free_port())
    metrics.close()
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        scrape(metrics.port)
    assert open_metrics(port=metrics.port).port == metrics.port


def test_one_json_line_per_record_is_on_disk_at_once_with_null_for_what_is_not_finite(open_metrics, tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = open_metrics(path)
    metrics.record_step(record())
    metrics.record_step(record(loss=math.nan, gradient_norm=math.inf, step_seconds={"total": math.nan}))
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())  # before close
    assert first.pop("time") <= second["time"]
    assert first == {**record().__dict__}
    assert (second["loss"], second["gradient_norm"], second["step_seconds"]) == (None, None, {"total": None})


@pytest.mark.parametrize("whole", ["", '{"step": 1}\n'])
@pytest.mark.parametrize("torn", ["", '{"ste'])
def test_the_file_is_appended_to_and_a_torn_last_line_goes(whole, torn, open_metrics, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(whole + torn)
    open_metrics(path).record_step(record())
    lines = path.read_text().splitlines()
    assert lines[:-1] == whole.splitlines()
    assert json.loads(lines[-1])["step"] == 20


def test_a_line_that_cannot_be_written_is_a_problem_until_it_could_be(open_metrics, tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = open_metrics(path)
    metrics.record_step(record())
    file = metrics._file
    with contextlib.suppress(OSError), open("/dev/full", "w") as metrics._file:
        metrics.record_step(record())
    with pytest.raises(OSError, match=rf"^{path}: cannot be written \(No space left on device\)"):
        metrics.require_written()
    metrics._file = file
    metrics.record_step(record())
    metrics.require_written()


def test_other_ranks_write_no_file(open_metrics, tmp_path):
    open_metrics(tmp_path / "metrics.jsonl", rank=1).record_step(record())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def host_time(monkeypatch) -> list[float]:
    """The host clock under the test's control: host_time[0] is now, in seconds."""
    now = [0.0]
    monkeypatch.setattr(train.metrics.time, "perf_counter", lambda: now[0])
    return now


def spend(timer: PhaseTimer, now: list[float], **seconds: float) -> None:
    for name, duration in seconds.items():
        with timer.phase(name):
            now[0] += duration


def test_phase_times_are_means_per_step_and_add_up_to_at_most_the_total(host_time):
    timer = PhaseTimer("cpu")
    for _ in range(2):
        spend(timer, host_time, data=1.0, forward=2.0)
        spend(timer, host_time, data=3.0, forward=4.0)  # the second micro-batch of the same step
        spend(timer, host_time, optimizer=0.5)
        host_time[0] += 0.25  # outside of every phase
    window = timer.window(steps=2)
    assert window == {"data": 4.0, "forward": 6.0, "optimizer": 0.5, "total": 10.75}


def test_a_window_forgets_the_one_before(host_time):
    timer = PhaseTimer("cpu")
    spend(timer, host_time, data=1.0)
    timer.window(steps=1)
    spend(timer, host_time, head=3.0)
    assert timer.window(steps=1) == {"head": 3.0, "total": 3.0}


def test_device_events_are_read_one_window_late(host_time, monkeypatch):
    class LateClock(train.metrics._HostClock):
        windows_late = 1

    monkeypatch.setattr(train.metrics, "_CudaClock", LateClock)
    timer = PhaseTimer("cuda")
    spend(timer, host_time, forward=2.0)
    assert timer.window(steps=2) == {}
    spend(timer, host_time, forward=30.0)
    assert timer.window(steps=3) == {"forward": 1.0, "total": 1.0}  # the first window, over its own two steps
    assert timer.window(steps=1) == {"forward": 10.0, "total": 10.0}


@pytest.mark.gpu
def test_cuda_events_time_the_device():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: that events measure device time was not checked")
    timer = PhaseTimer("cuda")
    with timer.phase("forward"):
        torch.cuda._sleep(100_000_000)  # device cycles: tens of milliseconds, while the host goes on at once
    assert timer.window(steps=1) == {}
    window = timer.window(steps=1)
    assert 0.01 < window["forward"] <= window["total"]


def test_the_readme_shows_the_table_as_it_is():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert metrics_table() in readme
