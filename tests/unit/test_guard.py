import json
import math
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import DataError
from train.config import GuardConfig
from train.dist import RankError
from train.guard import DIVERGENCE, GRADIENT, LOSS, OVERFLOW, SPIKE, Guard, Skip, diagnose, has_stalled, skip_text, stop_text


class FakeRanks:
    """Rank 0 among ``world_size`` that all say the same."""

    rank, is_first = 0, True

    def __init__(self, world_size=1, device="cpu"):
        self.world_size, self.device, self.said = world_size, torch.device(device), []

    def say(self, text):
        self.said.append(text)

    def gather(self, value):
        return [value] * self.world_size

    def together(self, action):
        try:
            return action()
        except (ValueError, OSError) as error:
            raise RankError(str(error)) from None


def make_guard(output, *, spike_factor=2.0, max_skipped=50, precision="fp32", ranks=None):
    guard = Guard(GuardConfig(spike_factor=spike_factor, max_skipped=max_skipped), ranks or FakeRanks(), Path(output), precision)
    guard.enter_stage("early")
    return guard


def never():
    raise AssertionError("nobody has to know this")


def take_step(guard, step, *losses, applied=True, ranks=(), names=None):
    """One step of a micro-batch per loss; returns what each loss became, and the factor on its gradient."""
    watched = []
    for micro, value in enumerate(losses):
        loss = torch.tensor(value, requires_grad=True)
        passed = guard.watch(loss, names or (never if applied else lambda micro=micro: [f"micro-batch {micro}"]))
        passed.backward()
        watched.append((float(passed.detach()), float(loss.grad)))
    guard.after_step(step, torch.tensor(losses).mean(), applied, never if applied else lambda: list(ranks))
    return watched


def settle(guard, loss=10.0, steps=20):
    for step in range(1, steps + 1):
        take_step(guard, step, loss)
    return steps + 1


def lines_of(output):
    return [json.loads(line) for line in (output / "skipped_steps.jsonl").read_text().splitlines()]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("losses", "spiked", "ranks", "precision", "expected"),
    [
        ([9.0, 30.0], [False, True], [], "fp32", (SPIKE, [1])),
        ([9.0, NAN], [False, False], [3], "bf16", (LOSS, [1])),
        ([30.0, INF, 9.0, NAN], [True, True, False, False], [], "fp32", (LOSS, [1, 3])),  # not finite is the worse of the two
        ([9.0, 9.0], [False, False], [3], "fp16", (GRADIENT, [0, 1])),
        ([9.0, 9.0], [False, False], [], "bf16", (GRADIENT, [0, 1])),
        ([9.0, 9.0], [False, False], [], "fp16", (OVERFLOW, [0, 1])),
        ([NAN], [False], [], "fp16", (LOSS, [0])),
        ([30.0], [True], [], "fp16", (SPIKE, [0])),
    ],
)
def test_the_reason_of_a_skipped_step_and_the_micro_batches_to_blame(losses, spiked, ranks, precision, expected):
    assert diagnose(losses, spiked, ranks, precision) == expected


def test_a_loss_above_the_limit_gets_a_gradient_of_nan_and_any_other_its_own(tmp_path):
    guard = make_guard(tmp_path)
    settle(guard)
    (high, low) = take_step(guard, 21, 20.5, 20.0, applied=False)
    assert all(map(math.isnan, high))
    assert low == (20.0, 1.0)


def test_the_first_20_applied_steps_of_a_stage_know_no_spike(tmp_path):
    guard = make_guard(tmp_path)
    settle(guard, steps=19)
    take_step(guard, 20, NAN, applied=False)  # does not count
    assert take_step(guard, 21, 1000.0) == [(1000.0, 1.0)]
    assert math.isnan(take_step(guard, 22, 1000.0, applied=False)[0][1])


def test_a_stage_begins_with_a_mean_of_its_own(tmp_path):
    guard = make_guard(tmp_path)
    settle(guard, 10.0)
    guard.enter_stage("early")
    assert math.isnan(take_step(guard, 21, 30.0, applied=False)[0][1]), "the same stage goes on"
    guard.enter_stage("stable")
    settle(guard, 30.0)
    assert take_step(guard, 42, 55.0) == [(55.0, 1.0)]


def test_the_running_mean_starts_with_the_first_loss_and_keeps_098_of_itself(tmp_path):
    guard = make_guard(tmp_path, spike_factor=None)
    losses = [float(loss) for loss in torch.rand(300, generator=torch.Generator().manual_seed(0)) * 10]
    mean = losses[0]
    for step, loss in enumerate(losses, 1):
        take_step(guard, step, loss)
        mean = 0.98 * mean + 0.02 * loss if step > 1 else loss
    assert guard.state()["mean"] == pytest.approx(mean, rel=1e-6)  # float32, where 50 steps' roundings of 6e-8 count


def test_a_skipped_step_leaves_the_mean_alone(tmp_path):
    guard = make_guard(tmp_path)
    settle(guard)
    mean = guard.state()["mean"]
    take_step(guard, 21, 50.0, applied=False)
    take_step(guard, 22, 11.0, applied=False, ranks=[0])
    assert guard.state()["mean"] == mean
    take_step(guard, 23, 11.0)
    assert guard.state()["mean"] != mean


def test_without_a_spike_factor_every_loss_passes_as_it_is(tmp_path):
    guard = make_guard(tmp_path, spike_factor=None)
    settle(guard)
    assert take_step(guard, 21, 1e9, INF) == [(1e9, 1.0), (INF, 1.0)]


def test_nothing_reads_the_device_as_long_as_steps_are_applied(tmp_path):
    """A tensor on the meta device has no value to read: a look at one raises."""
    guard = make_guard(tmp_path, ranks=FakeRanks(device="meta"))
    for step in range(1, 30):
        loss = torch.empty((), device="meta", requires_grad=True)
        guard.watch(loss, never).backward()
        guard.after_step(step, loss.detach(), True, never)
    with pytest.raises((RuntimeError, NotImplementedError)):
        guard.state()


def test_a_spike_is_written_down_with_the_records_of_its_micro_batch_on_every_rank(tmp_path):
    ranks = FakeRanks(world_size=2)
    guard = make_guard(tmp_path, ranks=ranks)
    step = settle(guard)
    take_step(guard, step, 9.0, 50.0, applied=False)
    records = {"0": ["micro-batch 1"], "1": ["micro-batch 1"]}
    assert lines_of(tmp_path) == [
        {"step": 21, "stage": "early", "reason": "spike", "loss": 50.0, "running_mean": 10.0, "ranks": [], "records": records}
    ]
    file = tmp_path / "skipped_steps.jsonl"
    assert ranks.said == [f"step 21 skipped on all ranks: spike (loss 50, running mean 10); the records of all ranks are in {file}"]


def test_where_a_rank_is_to_blame_only_its_records_are_written_down(tmp_path):
    guard = make_guard(tmp_path, ranks=FakeRanks(world_size=3))
    take_step(guard, 1, 9.0, NAN, applied=False, ranks=[2])
    take_step(guard, 2, 9.0, 7.0, applied=False, ranks=[0, 1])
    whole_step = ["micro-batch 0", "micro-batch 1"]
    first, second = lines_of(tmp_path)
    assert first == {
        "step": 1,
        "stage": "early",
        "reason": "loss not finite",
        "loss": None,
        "running_mean": None,
        "ranks": [2],
        "records": {"2": []},  # the fake lets rank 2 say what rank 0 does: nothing, for it is not asked
    }
    assert (second["reason"], second["loss"], second["records"]) == ("gradient not finite", 8.0, {"0": whole_step, "1": whole_step})


def test_an_overflow_of_fp16_is_counted_and_names_nobody(tmp_path):
    ranks = FakeRanks()
    guard = make_guard(tmp_path, precision="fp16", max_skipped=3, ranks=ranks)
    for step in (1, 2):
        take_step(guard, step, 9.0, applied=False, names=never)
    assert not ranks.said
    with pytest.raises(RankError, match=r"steps 1 to 3 were all skipped: fp16 overflow \(3 x\); the last loss is 9\. An ArcFace") as error:
        take_step(guard, 3, 9.0, applied=False, names=never)
    assert "jsonl" not in str(error.value)
    assert not (tmp_path / "skipped_steps.jsonl").exists()


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_say_all(tmp_path):
    guard = make_guard(tmp_path, max_skipped=3, ranks=FakeRanks(world_size=6))
    step = settle(guard)
    take_step(guard, step, NAN, applied=False, ranks=[0])
    take_step(guard, step + 1, NAN, applied=False, ranks=[0])
    take_step(guard, step + 2, 10.0)  # the row ends here
    take_step(guard, step + 3, 50.0, applied=False)
    take_step(guard, step + 4, 10.0, applied=False, ranks=[5, 3])
    with pytest.raises(RankError) as error:
        take_step(guard, step + 5, NAN, applied=False, ranks=[3])
    text = str(error.value)
    assert text.startswith("steps 24 to 26 were all skipped: spike (1 x), gradient not finite (1 x), loss not finite (1 x) on ranks 3, 5; ")
    assert f"the last loss is nan. The records are in {tmp_path / 'skipped_steps.jsonl'}. A loss that stays above" in text
    assert text.endswith(DIVERGENCE)


def test_the_advice_to_raise_the_limit_is_given_for_spikes_alone(tmp_path):
    spike, other = (Skip(1, "early", reason, 9.0, 3.0, []) for reason in (SPIKE, GRADIENT))
    assert "guard.spike_factor" in stop_text([other, spike], tmp_path)
    assert "guard.spike_factor" not in stop_text([other], tmp_path)


def test_the_log_line_names_the_ranks_to_blame(tmp_path):
    file = tmp_path / "skipped_steps.jsonl"
    one, two = (Skip(812, "stable", LOSS, NAN, 3.25, ranks) for ranks in ([3], [1, 3]))
    end = f"are in {file}"
    assert (
        skip_text(one, file) == f"step 812 skipped on all ranks: loss not finite on rank 3 (loss nan, running mean 3.25); its records {end}"
    )
    assert skip_text(two, file).endswith(f"on ranks 1, 3 (loss nan, running mean 3.25); their records {end}")


def test_records_that_cannot_be_named_stop_the_run_with_the_reason(tmp_path):
    def fail():
        raise DataError("shards.idx: cannot read the index")

    with pytest.raises(RankError, match=r"shards\.idx: cannot read the index"):
        take_step(make_guard(tmp_path), 1, NAN, applied=False, names=fail)


def test_the_file_that_cannot_be_written_stops_the_run_with_the_reason(tmp_path):
    with pytest.raises(RankError, match=r"No such file or directory: .*gone/skipped_steps\.jsonl"):
        take_step(make_guard(tmp_path / "gone"), 1, NAN, applied=False)


def test_a_guard_restored_from_json_continues_bit_for_bit(tmp_path):
    """Also in the middle of a row of skipped steps, with a loss that is not finite."""
    generator = torch.Generator().manual_seed(1)
    losses = (torch.rand(60, generator=generator) * 7 + 3).tolist()
    guard = make_guard(tmp_path, max_skipped=4)
    for step, loss in enumerate(losses[:30], 1):
        take_step(guard, step, loss)
    guard.after_window(math.pi, 0.0)
    take_step(guard, 31, NAN, applied=False)
    take_step(guard, 32, 60.0, applied=False)
    restored = make_guard(tmp_path, max_skipped=4)
    restored.load_state(json.loads(json.dumps(guard.state())))
    restored.enter_stage("early")  # as a resumed run does
    for each in (guard, restored):
        take_step(each, 33, 8.0, applied=False)
        with pytest.raises(RankError, match="steps 31 to 34 were all skipped"):
            take_step(each, 34, 8.0, applied=False)
        for step, loss in enumerate(losses[30:], 35):
            take_step(each, step, loss)
    assert guard.state() == restored.state()
    limit = 2.0 * guard.state()["mean"]
    for loss, spikes in ((limit * (1 - 1e-6), False), (limit * (1 + 1e-6), True)):  # float32 knows 6e-8
        for each in (guard, restored):
            assert math.isnan(take_step(each, 70, loss, applied=False, ranks=[0])[0][1]) == spikes


def test_a_stalled_loss_is_said_once_an_epoch_after_the_warm_up(tmp_path):
    ranks = FakeRanks()
    guard = make_guard(tmp_path, ranks=ranks)
    for epochs, loss in ((-1.0, 20.0), (0.0, 19.9), (0.99, 19.9)):
        guard.after_window(loss, epochs)
    assert not ranks.said
    guard.after_window(19.5, 1.2)
    assert ranks.said == [f"the loss has stalled: 20.0000 at the start, 19.5000 1.2 epochs after the warm-up. {DIVERGENCE}"]
    guard.after_window(19.5, 1.4)
    restored = make_guard(tmp_path, ranks=ranks)
    restored.load_state(json.loads(json.dumps(guard.state())))
    restored.after_window(19.5, 1.6)
    assert len(ranks.said) == 1


def test_a_loss_that_fell_is_not_called_stalled_when_a_later_stage_raises_it(tmp_path):
    ranks = FakeRanks()
    guard = make_guard(tmp_path, ranks=ranks)
    for epochs, loss in ((-1.0, math.nan), (-0.5, 20.0), (1.0, 18.0), (5.0, 25.0)):
        guard.after_window(loss, epochs)
    assert not ranks.said


@pytest.mark.parametrize(("loss", "stalled"), [(19.01, True), (19.0, False), (math.nan, False)])
def test_a_loss_has_stalled_above_095_of_its_start(loss, stalled):
    assert has_stalled(20.0, loss) == stalled
