"""A run that begins with given weights: all ranks have them, masters and mean included, and a run that goes on does not need the file."""

import hashlib
import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.training import given_weights, losses, packed_faces, train_on_rank, write_recipe
from train.config import load_run_config
from train.dist import RankError

FROZEN = {"stages": [{"name": "head", "steps": 2, "freeze_backbone": True}], "schedule": {}}  # what it ends with is what it began with


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_faces(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return given_weights(tmp_path_factory.mktemp("weights"))[1]


def train_with_weights_on_rank_0_alone(group, recipe, ds_config, weights):
    """The path exists for rank 0 and for no other."""
    os.chdir(weights.parent if dist.get_rank(group) == 0 else "/")
    return train_on_rank(group, recipe, ds_config, ["model.init_from=given.safetensors"])


@pytest.mark.parametrize("ds_config", ["zero1_fp32.json", "zero3_bf16.json", pytest.param("zero2_bf16.json", marks=pytest.mark.slow)])
def test_every_rank_begins_with_the_weights_of_rank_0_s_file(ds_config, shards, weights, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", **FROZEN)
    assert run_ranks(2, train_with_weights_on_rank_0_alone, recipe, ds_config, weights) == [2, 2]
    folder, given = tmp_path / "run/checkpoints/step_00000002", load_file(weights)
    for name in ("backbone", "backbone_ema"):  # of float32 masters and their mean, gathered from all ranks
        assert all(torch.equal(tensor, given[key]) for key, tensor in load_file(folder / f"{name}.safetensors").items())
    for rank in (0, 1):  # of which each has its own
        buffers = torch.load(folder / f"rank_{rank:05d}.pt", weights_only=True)["buffers"]
        assert all(torch.equal(tensor, given[key]) for key, tensor in buffers.items())
    origin = {"file": "given.safetensors", "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert json.loads((folder / "manifest.json").read_text())["run"]["origin"] == origin
    assert load_run_config(tmp_path / "run/recipe.yaml").model.init_from.name == "given.safetensors"


def go_on(group, recipe, override):
    """What rank 0 says when a run goes on."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_on_rank(group, recipe, "zero1_fp32.json", [override])
    return said.getvalue()


def test_a_run_goes_on_without_the_file_and_says_where_it_began(shards, weights, tmp_path):
    given = tmp_path / "gone.safetensors"
    shutil.copy(weights, given)
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", checkpoint={"every_steps": 3, "keep_last": 9})
    assert run_ranks(1, train_on_rank, recipe, "zero1_fp32.json", [f"model.init_from={given}"]) == [8]
    expected = losses(tmp_path / "run")
    for step in (4, 6, 8):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:08d}")
    (tmp_path / "run/checkpoints/latest").write_text("step_00000003")
    given.unlink()
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    (said,) = run_ranks(1, go_on, recipe, f"model.init_from={given}")
    assert f"the run began with {given} (SHA-256 {digest})" in said
    assert "model.init_from is not read" in said
    assert losses(tmp_path / "run") == expected


def test_a_loss_that_stays_is_told_of_a_random_backbone_alone(shards, weights, tmp_path):
    for override, told in (("model.init_from=null", True), (f"model.init_from={weights}", False)):
        recipe = write_recipe(tmp_path / f"{told}.yaml", shards, tmp_path / f"{told}", optimizer={"lr": 1e-12})
        (said,) = run_ranks(1, go_on, recipe, override)
        assert ("the loss has stalled" in said) == told


def make_older(manifest):
    """As before there were model.init_from, head.init_centers, stages.N.freeze_backbone."""
    about = json.loads(manifest.read_text())
    del about["run"]["origin"], about["identity"]["recipe"]["head"]["init_centers"]
    for stage in about["identity"]["recipe"]["stages"]:
        del stage["freeze_backbone"]
    manifest.write_text(json.dumps(about))


def test_a_checkpoint_from_before_these_keys_goes_on_where_they_are_at_their_defaults(shards, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", checkpoint={"every_steps": 3, "keep_last": 9})
    assert run_ranks(1, train_on_rank, recipe, "zero1_fp32.json") == [8]
    expected, checkpoints = losses(tmp_path / "run"), tmp_path / "run/checkpoints"
    for step in (4, 6, 8):
        shutil.rmtree(checkpoints / f"step_{step:08d}")
    make_older(checkpoints / "step_00000003/manifest.json")
    (message,) = run_ranks(1, refused, recipe, "head.init_centers=class_means")
    assert "recipe.head.init_centers: this run has class_means, the checkpoint None" in message
    (said,) = run_ranks(1, go_on, recipe, "resume=required")
    assert "step_00000003: step 3" in said
    assert losses(tmp_path / "run") == expected


def refused(group, recipe, *overrides):
    with pytest.raises(RankError) as error:
        train_on_rank(group, recipe, "zero1_fp32.json", overrides)
    return str(error.value)


def test_weights_of_another_backbone_are_refused_with_what_was_expected_and_found(shards, weights, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", **FROZEN)
    given = f"model.init_from={weights}"
    messages = run_ranks(2, refused, recipe, given, "model.name=vit_xt", "model.embedding_size=64")
    assert messages[0] == messages[1]
    lines = messages[0].splitlines()
    assert f'model.name: expected "vit_xxt", which {weights} of model.init_from has, found "vit_xt"; set model.name=vit_xxt' in lines[0]
    assert f"model.embedding_size: expected 32, which {weights} of model.init_from has, found 64; set model.embedding_size=32" in lines[1]


def test_a_new_run_that_would_fit_class_centers_to_a_random_backbone_is_refused(shards, tmp_path):
    frozen = write_recipe(tmp_path / "frozen.yaml", shards, tmp_path / "run", **FROZEN)
    (message,) = run_ranks(1, refused, frozen)
    assert message.startswith("model.init_from: not given, but stages.0.freeze_backbone needs weights: stage head would fit")
    (message,) = run_ranks(1, refused, write_recipe(tmp_path / "r.yaml", shards, tmp_path / "run"), "head.init_centers=class_means")
    assert message.startswith("model.init_from: not given, but head.init_centers needs weights: class_means of a random backbone")


def test_a_file_that_is_not_there_is_named_on_every_rank(shards, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run", **FROZEN)
    messages = run_ranks(2, refused, recipe, f"model.init_from={tmp_path}/nothing.safetensors")
    assert messages[0] == messages[1]
    assert f"{tmp_path}/nothing.safetensors" in messages[0]
