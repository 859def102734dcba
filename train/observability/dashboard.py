"""Grafana's dashboard of a run, in the order in which it is asked about at three in the morning.

``python -m train.observability.dashboard`` writes ``dashboard.json`` beside this file (with requirements-dev.txt); Grafana reads that
file, and nobody edits it by hand. Every expression stands on the metrics alone: the dashboard works without the rules of ``alerts.yml``,
but for the number of alerts.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import AnnotationQuery, Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, VariableRefresh

from train.observability.panels import SOURCE, graph, histogram, listing, number

FILE = Path(__file__).with_name("dashboard.json")
_RANK = "rank {{rank}} ({{node}})"


def dashboard() -> Dashboard:
    """The whole dashboard, of the run and the Prometheus that are chosen at its top."""
    source = DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    run = QueryVariable("run").label("Run").datasource(SOURCE).query("label_values(lvface_build_info, run)")
    board = (
        Dashboard("LVFace run")
        .uid("lvface-run")
        .description("Each row answers one question; what a panel shows is said behind its title.")
        .refresh("30s")
        .time("now-6h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .variables([source, run.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)])
        .annotations([_alerts()])
    )
    ids = count(1)
    for question, answers in _rows().items():
        board.with_row(Row(question).id(next(ids)))
        for panel in answers:
            board.with_panel(panel.id(next(ids)))
    return board


def _rows() -> dict[str, list]:
    return {
        "Is it alive?": _alive(),
        "Where is each rank?": _place(),
        "How much is lost if I kill it?": _loss_of_work(),
        "Is it slow because of data, communication or one node?": _speed(),
        "Does it learn?": _learning(),
        "When is it done?": _end(),
    }


def _alive() -> list:
    return [
        number(
            "Ranks",
            "That answer Prometheus, of all ranks of the run. One that does not is dead, cut off, or its interpreter is held.",
            "none",
            ('sum(up{job="lvface", run="$run"})', "answer"),
            ('count(up{job="lvface", run="$run"})', "of"),
        ),
        number(
            "Alerts",
            "That fire for this run (alerts.yml); the red marks in the graphs say which.",
            "none",
            ('count(ALERTS{alertstate="firing", run="$run"}) or vector(0)', ""),
            limits={"green": None, "red": 1},
        ),
        number(
            "Longest phase",
            "Time since the rank that has stood still for longest entered a phase. Seconds are normal; see the table below for who.",
            "s",
            ('max(time() - lvface_heartbeat_timestamp_seconds{run="$run"})', ""),
            limits={"green": None, "orange": 60, "red": 180},
        ),
        number("Step", "Optimizer steps since the start of the run.", "none", ('max(lvface_step{run="$run"})', "")),
        number("Restarts", "From a checkpoint.", "none", ('max(lvface_restarts{run="$run"})', "")),
        number("Stage", "Index and name.", "none", ('lvface_stage{run="$run", rank="0"}', "{{name}}")),
    ]


def _place() -> list:
    where = '(time() - lvface_heartbeat_timestamp_seconds{run="$run"}) * on (run, rank) group_right () (lvface_phase{run="$run"} == 1)'
    return [
        listing(
            "Phases",
            "Of a run that stands still the rank at the top is to blame: the others entered the phase in which they wait for it later.",
            "s",
            where,
            "in it for",
        ),
        graph(
            "Time in a phase",
            "Since each rank last entered one. A line that climbs is a rank that stands still.",
            "s",
            ('time() - lvface_heartbeat_timestamp_seconds{run="$run"}', _RANK),
            width=12,
        ),
    ]


def _loss_of_work() -> list:
    return [
        number(
            "Work at stake",
            "Since the newest checkpoint, or since this process started where it has written none. SIGUSR1 saves before it ends the run.",
            "s",
            (
                'time() - (lvface_checkpoint_timestamp_seconds{run="$run", rank="0"} > 0'
                ' or on (run, rank) process_start_time_seconds{job="lvface", run="$run", rank="0"})',
                "",
            ),
            limits={"green": None, "orange": 3600, "red": 7200},
        ),
        number(
            "Steps at stake",
            "Since the newest checkpoint.",
            "none",
            ('lvface_step{run="$run", rank="0"} - lvface_checkpoint_step{run="$run", rank="0"}', ""),
        ),
        number(
            "Room",
            "Checkpoints that the disk has room for. The next save fails below one.",
            "none",
            ('lvface_checkpoint_free_bytes{run="$run", rank="0"} / lvface_checkpoint_size_bytes{run="$run", rank="0"}', ""),
            limits={"red": None, "orange": 2, "green": 4},
        ),
        graph(
            "Saving",
            "How long a save takes, and for how much of that it holds up training; the slowest rank.",
            "s",
            ('max(lvface_checkpoint_duration_seconds{run="$run"})', "whole"),
            ('max(lvface_checkpoint_blocked_seconds{run="$run"})', "held up"),
            width=12,
        ),
    ]


def _speed() -> list:
    own = 'sum by (rank, node) (rate(lvface_step_part_seconds_total{run="$run", part=~"data_wait|head|forward|backward|optimizer"}[5m]))'
    waits = 'sum by (rank, node) (rate(lvface_step_part_seconds_total{run="$run", part="%s"}[5m]))'
    return [
        graph(
            "Images per second",
            "All ranks together.",
            "none",
            ('sum(rate(lvface_samples_total{run="$run"}[5m]))', "images/s"),
        ),
        graph(
            "Where a step's time goes",
            "Mean of all ranks. Much data_wait: storage or decoding. Much comm on all ranks: the network; on all but one: that one.",
            "percentunit",
            (
                'sum by (part) (rate(lvface_step_part_seconds_total{run="$run"}[5m]))'
                ' / scalar(sum(rate(lvface_step_part_seconds_total{run="$run"}[5m])))',
                "{{part}}",
            ),
            stacked=True,
        ),
        graph(
            "Own work by rank",
            "Seconds of each second in which a rank waits for no other. The straggler is the highest line.",
            "percentunit",
            (own, _RANK),
        ),
        graph("Waiting for other ranks", "By rank. The straggler is the lowest line.", "percentunit", (waits % "comm", _RANK)),
        graph("Waiting for images", "By rank; a node with a slow disk stands out.", "percentunit", (waits % "data_wait", _RANK)),
        graph(
            "Own work by node",
            "Mean of its ranks.",
            "percentunit",
            (f"avg by (node) ({own})", "{{node}}"),
        ),
        graph(
            "Time of a step",
            "Median and 99th percentile over all ranks.",
            "s",
            *(
                (f'histogram_quantile({q}, sum by (le) (rate(lvface_step_duration_seconds_bucket{{run="$run"}}[5m])))', name)
                for q, name in ((0.5, "median"), (0.99, "99 %"))
            ),
        ),
        graph(
            "Model utilization",
            "Share of the GPU's peak that the model's own operations use, mean of all ranks. None where the peak is unknown, as on a CPU.",
            "percentunit",
            ('avg(lvface_model_utilization_ratio{run="$run"})', "utilization"),
        ),
        graph(
            "Operations per second",
            "Floating-point operations of the model, all ranks together.",
            "none",
            ('sum(rate(lvface_model_operations_total{run="$run"}[5m]))', "operations/s"),
        ),
        graph(
            "Batches read ahead",
            "On the rank that has the fewest. 0 beside much waiting for images: reading is too slow.",
            "none",
            ('min(lvface_data_queue_batches{run="$run"})', "fewest"),
        ),
        graph(
            "Reading",
            "Bytes per second of each node.",
            "Bps",
            ('sum by (node) (rate(lvface_record_bytes_total{run="$run"}[5m]))', "{{node}}"),
        ),
        graph(
            "Memory",
            "Peak of each rank, of all that its device has (on a CPU: its machine).",
            "percentunit",
            ('lvface_memory_bytes{run="$run", kind="peak"} / ignoring (kind) lvface_memory_bytes{run="$run", kind="total"}', _RANK),
        ),
    ]


def _learning() -> list:
    def first(name: str, labels: str = "") -> str:
        return f'{name}{{run="$run", rank="0"{labels}}}'  # equal on all ranks

    return [
        graph(
            "Loss", "Mean and highest of a log window.", "none", (first("lvface_loss"), "mean"), (first("lvface_loss_maximum"), "highest")
        ),
        graph(
            "Cosines",
            "Of an embedding to its own class center, to its own expectation, and to the nearest other class. They should part.",
            "none",
            (first("lvface_target_cosine"), "own center"),
            (first("lvface_expectation_cosine"), "own expectation"),
            (first("lvface_hardest_negative_cosine"), "nearest other"),
        ),
        histogram(
            "Cosine to the own center",
            "Samples of all ranks. A second hump at low cosines is wrong labels, or classes that are not learned.",
            'sum by (le) (increase(lvface_own_center_cosine_bucket{run="$run"}[5m]))',
        ),
        graph("Gradient norm", "Before clipping.", "none", (first("lvface_gradient_norm"), "{{group}}")),
        graph("Learning rate", "Of the last step.", "none", (first("lvface_learning_rate"), "learning rate")),
        graph(
            "Skipped steps",
            "Per minute, by reason; and the loss scale's exponent of two under fp16.",
            "none",
            ('60 * rate(lvface_steps_total{run="$run", rank="0", outcome!="applied"}[5m])', "{{outcome}}"),
            ("log2(" + first("lvface_loss_scale") + ")", "log2 of the loss scale"),
        ),
        graph(
            "What ends a stage",
            "Mean square of the cosine to the own center, and what a stage's threshold is compared with.",
            "none",
            (first("lvface_target_cosine_square"), "mean square"),
            (first("lvface_target_cosine_smoothed"), "smoothed"),
        ),
        graph(
            "Centers and expectations",
            "Cosine of class center and expectation, how far a step moves an expectation (1 - cosine), and the centers' mean norm.",
            "none",
            (first("lvface_center_expectation_cosine"), "center to expectation"),
            (first("lvface_expectation_drift"), "drift"),
            (first("lvface_center_norm"), "center norm"),
        ),
        graph(
            "Classes",
            "Of all ranks: held, scored in a step, met in it; and those that have an expectation.",
            "none",
            ('sum by (kind) (lvface_head_classes{run="$run"})', "{{kind}}"),
            (first("lvface_expectation_classes"), "with expectation"),
        ),
        graph(
            "Margins",
            "What losses learn or follow, where they do: t of CurricularFace, threshold of UniFace, norms of AdaFace.",
            "none",
            (first("lvface_curricular_t"), "t"),
            (first("lvface_uniface_bias"), "threshold"),
            (first("lvface_norm_mean"), "norm, mean"),
            (first("lvface_norm_std"), "norm, standard deviation"),
        ),
        graph(
            "Accuracy",
            "On the sets of pairs of eval, by the newest evaluation; nothing before the first one.",
            "percentunit",
            (first("lvface_evaluation_accuracy_ratio"), "accuracy on {{set}}"),
            (first("lvface_evaluation_true_accept_ratio"), "TAR on {{set}} at FAR {{false_accept_rate}}"),
        ),
        graph(
            "Damaged records",
            "Replaced by others per minute, by rank.",
            "none",
            ('60 * rate(lvface_records_total{run="$run", outcome="replaced"}[5m])', _RANK),
        ),
    ]


def _end() -> list:
    return [
        number("Remaining", "At the present throughput.", "s", ('max(lvface_remaining_seconds{run="$run"})', "")),
        number(
            "Done",
            "Steps taken, of all at the latest.",
            "percentunit",
            ('max(lvface_step{run="$run"}) / max(lvface_target_steps{run="$run"})', ""),
        ),
        number("Epoch", "Passes over the training images.", "none", ('max(lvface_epoch{run="$run"})', ""), decimals=2),
        graph(
            "What time was spent on",
            "By rank 0 since its process began. Only train is progress; repeat is work that a restart or a rollback lost.",
            "percentunit",
            (
                'lvface_run_time_seconds_total{run="$run", rank="0"}'
                ' / ignoring (kind) group_left () sum without (kind) (lvface_run_time_seconds_total{run="$run", rank="0"})',
                "{{kind}}",
            ),
            width=12,
            stacked=True,
        ),
    ]


def _alerts() -> AnnotationQuery:
    """A red mark in every graph where an alert of this run begins."""
    query = 'ALERTS{alertstate="firing", run="$run"}'
    return AnnotationQuery().name("Alerts").datasource(SOURCE).enable(True).icon_color("red").expr(query)


def as_json() -> str:
    """The dashboard as Grafana reads it."""
    return JSONEncoder(sort_keys=False, indent=1).encode(dashboard().build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(as_json(), encoding="utf-8")
