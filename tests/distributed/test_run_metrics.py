"""What a run says of itself, log line by log line, adds up."""

import json
import math

import pytest

from model.flops import backbone_flops
from model.vit import PRESETS
from tests.ranks import run_ranks
from tests.training import IDENTITIES, packed_faces, train_on_rank, write_recipe
from train.timing import RUN_TIMES

STEPS, SAMPLES = 8, 16  # of a run, and of a step and rank


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_faces(tmp_path_factory.mktemp("metrics"))


def train_and_tell(group, recipe, kill=None, known=()):
    """The records of this rank and the uses of its time. ``known``: numbers of records that are known to be damaged."""
    from data_pipeline.loader import FaceLoader
    from train.metrics import Metrics
    from train.run import Run

    initial = FaceLoader.__init__
    FaceLoader.__init__ = lambda self, *args, **options: initial(self, *args, **{**options, "bad_records": dict.fromkeys(known, "damaged")})
    told, close, publish = {"records": []}, Run.close, Metrics.record_step
    Run.close = lambda self: (told.update(seconds=self.run_time.seconds), close(self))
    Metrics.record_step = lambda self, record: (told["records"].append(record), publish(self, record))
    train_on_rank(group, recipe, "zero1_fp32.json", (), kill)
    return told


@pytest.mark.parametrize("log_every", [1, 3])
def test_windows_add_up_to_the_run_on_every_rank(log_every, shards, tmp_path):
    metrics = {"port": 0, "log_every": log_every, "peak_tflops": 0.5}
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", metrics=metrics)
    for told in run_ranks(2, train_and_tell, recipe):
        records = told["records"]
        assert [record.step for record in records] == [step for step in range(1, STEPS + 1) if step % log_every == 0 or step == STEPS]
        assert sum(record.samples for record in records) == STEPS * SAMPLES
        assert sum(sum(record.own_center_cosines.counts) for record in records) == STEPS * SAMPLES
        assert sum(sum(record.step_durations.counts) for record in records) == STEPS
        assert sum(record.outcomes["applied"] for record in records) == STEPS
        for record in records:
            assert sum(record.part_seconds.values()) == pytest.approx(record.step_durations.total)
            assert all(seconds >= -1e-6 for seconds in record.part_seconds.values())
            assert record.step_seconds["total"] == pytest.approx(record.step_durations.total / record.steps)
            assert record.loss_maximum >= record.loss if log_every > 1 else record.loss_maximum == record.loss
            assert record.head_classes["positive"] <= record.head_classes["sampled"] <= record.head_classes["held"] == IDENTITIES / 2
            assert record.utilization == pytest.approx(record.operations * record.images_per_second / record.images / 0.5e12)
            assert record.memory["used"] <= record.memory["peak"] <= record.memory["total"]
        last = records[-1]
        backbone = backbone_flops(PRESETS["vit_xxt"], mask_ratio=0.2, embedding_size=32)
        head = 2 * 16 * IDENTITIES / 2 * 32 * 5  # pco: two products for each of two anchors, and one for the class centers
        assert last.operations == last.steps * (SAMPLES * backbone + 2 * head)
        assert (last.records, last.bad_records) == ({"read": last.steps * SAMPLES, "replaced": 0}, 0)
        assert last.target_steps == last.furthest_step == STEPS
        assert told["seconds"]["repeat"] == 0
        assert math.isnan(last.hardest_negative_cosine)  # CurricularFace changes them


def test_a_run_that_was_killed_tells_restarts_and_what_it_did_again(shards, tmp_path):
    """Killed after step 5; the second process begins with step 5, or with 4 if the checkpoint at the stage's end was not complete."""
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run")
    with pytest.raises(AssertionError, match=r"ranks ended|failed"):
        run_ranks(2, train_and_tell, recipe, (0, 5))
    for told in run_ranks(2, train_and_tell, recipe, None, (0, 1)):
        assert {(record.bad_records, record.records["replaced"]) for record in told["records"]} == {(2, 0)}
        steps = [record.step for record in told["records"]]
        assert steps in ([5, 6, 7, 8], [4, 5, 6, 7, 8])
        assert [(record.restarts, record.furthest_step) for record in told["records"]] == [(1, max(step, 5)) for step in steps]
        assert told["seconds"].keys() == set(RUN_TIMES)
        assert told["seconds"]["repeat"] > 0
        assert told["seconds"]["train"] > told["seconds"]["repeat"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["restarts"] for line in lines] == [0] * 5 + [1] * (len(lines) - 5)
