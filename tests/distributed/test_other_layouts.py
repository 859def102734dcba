"""A run goes on at another world size and ZeRO stage from the same weights, moments, class centers and images."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from model.class_shard import ClassShard
from model.partial_fc import ROW_STATE, PartialFC
from tests.ranks import run_ranks, run_thread_ranks
from tests.training import IDENTITIES, ROOT, images_read, losses, packed_faces, train_on_rank, write_recipe
from train.checkpoint_folder import BACKBONE, BACKBONE_EMA, read_manifest
from train.rank_files import RankFiles, file_name, pooled_buffers

BATCH = 24  # images of a step, whatever the number of ranks
MICRO_BATCH = {1: 12, 2: 6, 3: 4, 4: 3}
KINDS = ("master", "exp_avg", "exp_avg_sq", "mean")
# Other ranks form other micro-batches, over which the embeddings' BatchNorm is computed, and drop other patches: not equal, but near.
LOSS_TOLERANCE = 0.25


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_faces(tmp_path_factory.mktemp("layouts"))


def spread_recipe(path, shards, output, world_size, **changes):
    batch = {"micro_batch_size": MICRO_BATCH[world_size], "global_batch_size": BATCH}
    return write_recipe(path, shards, output, batch=batch, **changes)


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    """Output of 2 ranks of ZeRO 1 that stopped at step 4 of 8, and of the run that did not."""
    folder = tmp_path_factory.mktemp("two-ranks")
    whole = spread_recipe(folder / "whole.yaml", shards, folder / "whole", 2)
    assert run_ranks(2, train_on_rank, whole, "zero1_fp32.json") == [8, 8]
    output = folder / "stopped"
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    for step in (3, 4):
        subprocess.run(["cp", "-r", folder / f"whole/checkpoints/step_{step:08d}", output / "checkpoints"], check=True)
    return output, folder / "whole"


def go_on(group, recipe, ds_config):
    """Resume, save at once what was resumed, and train to the end."""
    from train.run import Run

    resume = Run.resume

    def resume_and_save(self, saved):
        resume(self, saved)
        self.checkpoints.folder.path = self.checkpoints.folder.path.with_name("resumed")
        self.save()
        self.checkpoints.finish()
        self.checkpoints.folder.path = self.checkpoints.folder.path.with_name("checkpoints")

    Run.resume = resume_and_save
    return train_on_rank(group, recipe, ds_config)


def check_same_state(old, new, world_size):
    """The checkpoint at ``new``, of ``world_size`` ranks, holds what that of two ranks at ``old`` does, bit for bit."""
    before, after = RankFiles(old, 2), RankFiles(new, world_size)
    for kind in KINDS:
        mine, theirs = after.backbone(kind), before.backbone(kind)
        assert mine.keys() == theirs.keys()
        # Pooled again, the statistics of BatchNorm are rounded again.
        assert all(torch.allclose(mine[name], weight, rtol=1e-6, atol=0) for name, weight in theirs.items() if "running" in name)
        assert not [name for name, weight in theirs.items() if "running" not in name and not torch.equal(mine[name], weight)]
    engine, engine_before = after.of(0)["engine"], before.of(0)["engine"]
    assert {"step"} <= engine["optimizer"].keys()
    for name in ("optimizer", "groups", "loss_scaler", "counts", "moments", "shapes"):
        assert engine[name] == engine_before[name]
    assert [len(after.of(rank)["head"]["weight"]) for rank in range(world_size)] == [
        len(ClassShard(IDENTITIES, rank, world_size)) for rank in range(world_size)
    ]
    for name, value in before.of(0)["head"].items():
        if name in ROW_STATE:
            mine, theirs = (torch.cat([files.of(r)["head"][name] for r in range(files.world_size)]) for files in (after, before))
            assert torch.equal(mine, theirs), name
        else:
            assert all(torch.equal(after.of(rank)["head"][name], value) for rank in range(world_size)), name
    assert after.of(0)["loader"]["images"] == before.of(0)["loader"]["images"]


@pytest.mark.parametrize(
    ("world_size", "ds_config"),
    [(1, "zero1_fp32.json"), (3, "zero3_fp32.json"), (4, "zero2_fp32.json"), (2, "zero3_fp32.json")],
)
def test_a_run_goes_on_at_another_world_size_and_zero_stage(world_size, ds_config, shards, saved, tmp_path):
    stopped, whole = saved
    subprocess.run(["cp", "-r", stopped, tmp_path / "run"], check=True)
    recipe = spread_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", world_size)
    assert run_ranks(world_size, go_on, recipe, ds_config) == [8] * world_size
    check_same_state(stopped / "checkpoints/step_00000004", tmp_path / "run/resumed/step_00000004", world_size)
    mine, theirs = losses(tmp_path / "run"), losses(whole)
    assert sorted(mine) == [5, 6, 7, 8]
    assert all(mine[step] == pytest.approx(theirs[step], rel=LOSS_TOLERANCE) for step in mine)
    assert images_of_steps(tmp_path / "run", world_size) == {step: images for step, images in images_of_steps(whole, 2).items() if step > 4}
    layout = read_manifest(tmp_path / "run/checkpoints/step_00000008")["layout"]
    assert layout == {"world_size": world_size, "zero_stage": int(ds_config[4]), "micro_batch_sizes": [MICRO_BATCH[world_size]] * 2}


def images_of_steps(output, world_size):
    """Of each step the names of its images on all ranks, in order."""
    images = {}
    for rank in range(world_size):
        for (step, _), names in images_read(output, rank).items():
            images.setdefault(step, []).extend(names)
    return {step: sorted(names) for step, names in images.items()}


def test_a_checkpoint_rewritten_offline_equals_the_one_that_ranks_of_that_number_read(shards, saved, tmp_path):
    stopped, _ = saved
    command = [sys.executable, "-m", "train", "reshard", stopped / "checkpoints/step_00000004", tmp_path / "offline", "--world-size", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "rank 3/3" in result.stdout
    rewritten = tmp_path / "offline/checkpoints/step_00000004"
    check_same_state(stopped / "checkpoints/step_00000004", rewritten, 3)
    for name in (BACKBONE, BACKBONE_EMA):
        assert (rewritten / name).read_bytes() == (stopped / "checkpoints/step_00000004" / name).read_bytes()
    subprocess.run(["cp", "-r", stopped, tmp_path / "direct"], check=True)
    finals = []
    for name in ("offline", "direct"):
        recipe = spread_recipe(tmp_path / f"{name}.yaml", shards, tmp_path / name, 3)
        assert run_ranks(3, train_on_rank, recipe, "zero2_fp32.json") == [8, 8, 8]
        finals.append((tmp_path / name / "checkpoints/step_00000008" / BACKBONE).read_bytes())
    assert losses(tmp_path / "offline") == losses(tmp_path / "direct")
    assert finals[0] == finals[1]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: (run / "checkpoints/step_00000004/rank_00001.pt").unlink(), "rank_00001.pt is missing"),
        (lambda run: (run / "checkpoints/latest").unlink(missing_ok=True), "latest: cannot be read"),
    ],
)
def test_reshard_refuses_what_is_not_complete(damage, expected, saved, tmp_path):
    subprocess.run(["cp", "-r", saved[0], tmp_path / "run"], check=True)
    (tmp_path / "run/checkpoints/latest").write_text("step_00000004\n")
    damage(tmp_path / "run")
    command = [sys.executable, "-m", "train", "reshard", tmp_path / "run", tmp_path / "new", "--world-size", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert expected in result.stderr
    assert not (tmp_path / "new").exists()


CLASSES, D = 1003, 16


def trained_head(group, folder=None, old_world_size=None):
    """A head after three steps, saved to ``folder`` by each rank; or one that reads the rows of its ranks from there."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    head = PartialFC(D, CLASSES, 0.5, (1.0, 0.3, 0.1), 16.0, group=group, curricular=True)
    head.set_stage(0.5, "learned", update_expectation=True)
    if old_world_size is not None:
        head.load_state(RankFiles(folder, old_world_size).state_for(rank, world_size)["head"])
    for step in range(3):
        generator = torch.Generator().manual_seed(step + 100 * (old_world_size is not None))
        images = torch.randn(64, D, generator=generator)  # of the whole batch
        labels = torch.randint(0, CLASSES, (64,), generator=generator)
        share = slice(rank * 64 // world_size, (rank + 1) * 64 // world_size)
        embeddings = images[share].clone().requires_grad_()
        head(embeddings, labels[share]).backward()
        head.step(lr=1e-2, weight_decay=0.1)
    if folder is not None and old_world_size is None:
        state = {"head": head.state(), "num_classes": CLASSES, "loader": {"bad_records": {}}, "buffers": {}, "ema": None}
        torch.save(state, folder / file_name(rank))
    return {name: value.clone() for name, value in head.state().items()}


def keeps_on(group, folder):
    """Six steps without a break."""
    trained_head(group, folder)
    return trained_head(group, folder, dist.get_world_size(group))


def test_the_head_of_64_ranks_goes_on_at_32(tmp_path):
    """Rows with their moments and step counts, against 64 ranks that go on themselves."""
    expected = run_thread_ranks(64, keeps_on, tmp_path)
    states = run_thread_ranks(32, trained_head, tmp_path, 64)
    for name in expected[0]:
        if name in ROW_STATE:
            mine, theirs = (torch.cat([state[name] for state in every]) for every in (states, expected))
            assert mine.shape == theirs.shape
            # Gradients are sums over ranks, in another order.
            assert torch.allclose(mine.double(), theirs.double(), rtol=1e-4, atol=1e-6), name
        else:
            assert torch.allclose(states[0][name], expected[0][name], rtol=1e-4), name


def head_memory(group, folder, rows):
    """MiB that a rank of four gains while it takes its rows out of two files."""

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))

    before = anonymous()
    head = RankFiles(folder, 2).state_for(0, 4)["head"]
    assert len(head["weight"]) == rows // 4
    return anonymous() - before


def test_a_rank_reads_its_own_rows_alone(tmp_path):
    """A quarter of 64 MiB; the files are 32 MiB each."""
    rows = 2**15
    for rank in range(2):
        head = {"weight": torch.full((rows // 2, 512), float(rank)), "steps": torch.zeros(rows // 2, dtype=torch.int32)}
        state = {"head": head, "num_classes": rows, "loader": {"bad_records": {}}, "buffers": {}, "ema": None}
        torch.save(state, tmp_path / file_name(rank))
        os.sync()
    (gained,) = run_ranks(1, head_memory, tmp_path, rows)
    assert 10 < gained < 24


def test_pooled_statistics_are_those_of_all_images():
    """Of three ranks with as many images each, against mean and variance over all images."""
    images = torch.randn(3, 50, 7, dtype=torch.float64) * 3 + torch.arange(3.0).view(3, 1, 1)
    ranks = [
        {"bn.running_mean": x.mean(0), "bn.running_var": x.var(0, correction=0), "bn.num_batches_tracked": torch.tensor(5)} for x in images
    ]
    pooled = pooled_buffers(ranks)
    together = images.flatten(0, 1)
    assert torch.allclose(pooled["bn.running_mean"], together.mean(0))
    assert torch.allclose(pooled["bn.running_var"], together.var(0, correction=0))
    assert pooled["bn.num_batches_tracked"] == 5
