"""Bad input to the command line: one clear error that names what is wrong, exit code not 0 on every rank, nothing written or lost."""

import json
import re
import socket
import struct

import pytest
import yaml

from data_pipeline.shard_set import open_set
from tests.launch import errors, launch
from tests.ranks import run_ranks
from tests.training import IDENTITIES, ROOT, losses, packed_faces, train_on_rank, write_recipe


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_faces(tmp_path_factory.mktemp("bad-input"))


@pytest.fixture
def recipe(shards, tmp_path):
    return write_recipe(tmp_path / "recipe.yaml", shards, tmp_path / "run")


@pytest.mark.fault("a misspelt recipe key", "named once, exit code 2")
def test_a_misspelt_recipe_key_is_named_once_and_every_rank_fails(recipe, tmp_path):
    recipe.write_text(recipe.read_text() + "optimiser: {lr: 1.0}\n")
    result = launch(recipe, ranks=2)
    assert result.returncode != 0
    (error,) = errors(result)
    assert "optimiser: unknown key; did you mean optimizer?" in error
    assert str(recipe) in error
    assert not (tmp_path / "run").exists()


def test_a_misspelt_override_is_named(recipe):
    result = launch(recipe, "head.scael=3")
    assert result.returncode == 2
    assert "head.scael: unknown key; did you mean scale? (command line)" in errors(result)[0]


@pytest.mark.parametrize("key", ["zero_optimisation", "zero_optimization.stagee"])
def test_a_misspelt_deepspeed_key_is_named(key, recipe, tmp_path):
    config = json.loads((ROOT / "ds_configs/zero1_fp32.json").read_text())
    section, _, inner = key.partition(".")
    if inner:
        config[section][inner] = 1
    else:
        config[section] = {"stage": 1}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    result = launch(recipe, ds_config=path)
    assert result.returncode == 2
    assert f"{key}: unknown" in errors(result)[0]
    assert str(path) in errors(result)[0]


def test_stages_that_do_not_add_up_are_refused(recipe):
    stages = [{"name": "early", "epochs": 2}, {"name": "stable", "epochs": 3}]
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "stages": stages, "epochs": 6, "schedule": {}}))
    result = launch(recipe)
    assert result.returncode == 2
    assert "epochs: is 6, but the stages' epochs add up to 5 (early 2 + stable 3)" in errors(result)[0]


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_shard_set_that_is_missing_or_empty_is_named(how, recipe, tmp_path):
    path = tmp_path / "no-shards"
    if how == "empty":
        path.mkdir()
    result = launch(recipe, f"data.path={path}")
    assert result.returncode == 2
    assert str(path) in errors(result)[0]


@pytest.mark.slow
def test_more_ranks_than_batches_is_refused_with_the_numbers(recipe):
    result = launch(recipe, "batch.micro_batch_size=64", ranks=2)
    assert result.returncode != 0
    (error,) = errors(result)
    assert "num_images=96 is less than one global batch of 256 (world_size=2, batch_size=64)" in error


@pytest.mark.slow
@pytest.mark.fault("damaged records after a kill", "named; no checkpoint lost")
def test_more_damaged_records_than_allowed_stop_every_rank_and_lose_no_checkpoint(shards, recipe, tmp_path):
    """A killed run meets damaged labels when it goes on. It stops, goes on with others in their place when that is allowed, and ends."""
    checkpoints = tmp_path / "run" / "checkpoints"
    with pytest.raises(AssertionError):
        run_ranks(2, train_on_rank, recipe, "zero1_fp32.json", (), (0, 5))
    assert (checkpoints / "latest").read_text() == "step_00000004\n"
    faces = open_set(shards)
    sound = faces.shards[0].read_bytes()
    damaged = bytearray(sound)
    for offset in faces.records["offset"][:8].tolist():  # of the first shard
        damaged[offset + 12 : offset + 16] = struct.pack("<f", 77.0)  # the label stands after magic, length and flag
    try:
        faces.shards[0].write_bytes(damaged)
        refused = launch(recipe, "data.max_bad_records=1", ranks=2)
        assert (checkpoints / "latest").read_text() >= "step_00000004\n"
        result = launch(recipe, ranks=2)
    finally:
        faces.shards[0].write_bytes(sound)
    assert refused.returncode != 0
    assert re.search(r"label 77, the set's table says \d+; that is bad record number 2 of this rank.*allows 1", errors(refused)[0])
    assert result.returncode == 0
    # A checkpoint of the first may know records that the second need not name again, the one that was too many among them.
    said = refused.stderr + result.stderr
    named = set(re.findall(r"rank (\d): \S+shard_00000\.rec: record at offset (\d+) \(key \d+\): label 77, .*; (?:another|that)", said))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["bad_records"] == sum(rank == "0" for rank, _ in named) > 0
    assert len(losses(tmp_path / "run")) == 8


def test_a_pairs_file_that_is_not_there_is_an_error_before_training(recipe, tmp_path):
    result = launch(recipe, f"eval.images={tmp_path}", f"eval.pairs={tmp_path / 'pears.txt'}")
    assert result.returncode == 2
    assert "pears.txt" in errors(result)[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.fault("a set of other classes than the checkpoint's", "refused with both numbers")
def test_a_set_of_another_class_count_than_the_checkpoint_is_refused(recipe, tmp_path):
    assert launch(recipe, ranks=1).returncode == 0
    result = launch(recipe, "data.min_images_per_identity=1", f"data.path={packed_faces_of(11, tmp_path)}")
    assert result.returncode == 2
    assert f"num_classes: {IDENTITIES} in the state, 11 here" in errors(result)[0]


def packed_faces_of(identities, folder):
    from data_pipeline.pack import pack
    from data_pipeline.synthetic import write_synthetic

    write_synthetic(folder / "other-faces", identities, 9, seed=0)
    pack([folder / "other-faces"], folder / "other", 2)
    return folder / "other"


@pytest.mark.slow
@pytest.mark.fault("a metrics port that is taken", "the next one, with a warning")
def test_an_occupied_metrics_port_is_a_warning_and_training_goes_on(recipe, tmp_path):
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = occupied.getsockname()[1]
        result = launch(recipe, f"metrics.port={port}")
    assert result.returncode == 0
    assert f"port {port} is taken: metrics are at http://127.0.0.1:" in result.stderr
    assert len(losses(tmp_path / "run")) == 8
