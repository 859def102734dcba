"""The metrics as TensorBoard's own reader finds them."""

import math
import resource
import sys

import pytest

from tests.events import scalars
from tests.unit.test_metrics import LIVE, record
from train.config import MetricsConfig
from train.document import ConfigError
from train.metrics import BuildInfo, Metrics
from train.tensorboard import TensorBoard, require_tensorboard


@pytest.fixture
def metrics():
    metrics = Metrics(None, MetricsConfig(port=0), 0, 0, BuildInfo(world_size=2, zero_stage=1, precision="bf16"), lambda: LIVE)
    yield metrics
    metrics.close()


def write(board, metrics, steps, loss):
    for step in steps:
        metrics.record_step(record(step=step, loss=loss(step)))
        board.record(step, metrics.collect())


def test_scalars_have_the_names_and_values_that_prometheus_gets(metrics, tmp_path):
    board = TensorBoard(tmp_path, 0, print)
    write(board, metrics, [10, 20], lambda step: 1.0 / step)
    board.close()
    board.close()
    curves = scalars(tmp_path)
    assert curves["lvface_loss"] == pytest.approx({10: 0.1, 20: 0.05})
    assert curves["lvface_gradient_norm/head"] == {10: 0.5, 20: 0.5}
    assert curves["lvface_samples_total"] == {10: 320.0, 20: 640.0}
    curve_less = ("_info", "_phase", "_timestamp_seconds")
    expected = {
        "/".join([sample.name, *sample.labels.values()])
        for metric in metrics.collect()
        for sample in metric.samples
        if metric.type != "histogram" and not metric.name.endswith(curve_less)
    }
    assert set(curves) == expected


def test_values_are_there_before_the_file_is_closed_and_a_number_that_is_not_finite_is_none(metrics, tmp_path):
    board = TensorBoard(tmp_path, 0, print)
    write(board, metrics, [1, 2], lambda step: math.nan if step == 2 else 3.0)
    assert scalars(tmp_path)["lvface_loss"] == {1: 3.0}
    board.close()


def test_steps_that_are_taken_again_replace_those_of_the_killed_process(metrics, tmp_path):
    killed = TensorBoard(tmp_path, 0, print)
    write(killed, metrics, range(1, 10), lambda step: 1.0)
    resumed = TensorBoard(tmp_path, 6, print)
    write(resumed, metrics, range(7, 9), lambda step: 2.0)
    resumed.go_back(7)  # a rollback in the same process
    write(resumed, metrics, [8], lambda step: 3.0)
    resumed.close()
    assert scalars(tmp_path)["lvface_loss"] == {**dict.fromkeys(range(1, 7), 1.0), 7: 2.0, 8: 3.0}


def test_a_file_that_cannot_grow_is_told_once_and_training_goes_on(metrics, tmp_path):
    said = []
    board = TensorBoard(tmp_path, 0, said.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        write(board, metrics, range(1, 4), lambda step: 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    board.go_back(1)
    board.close()
    assert said == [f"warning: {tmp_path}: TensorBoard's events cannot be written (File too large); the run goes on without them"]


def test_a_missing_package_is_named_with_what_to_do(monkeypatch):
    require_tensorboard()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"metrics\.tensorboard: true needs the package tensorboardX .* pip install -r requirements\.txt"):
        require_tensorboard()
