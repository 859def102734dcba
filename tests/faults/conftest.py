"""What the faults happen to: one set of faces, runs on it that nobody disturbed, and a scene for those that somebody does."""

from pathlib import Path

import pytest

from tests.faults.scene import Scene
from tests.ranks import run_ranks
from tests.training import packed_faces, recipe_for, train_on_rank


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return packed_faces(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def finished(shards, tmp_path_factory):
    """``finished(ds_config, world_size)``: the output of a run that nobody disturbed; each is trained once."""
    folder, runs = tmp_path_factory.mktemp("finished"), {}

    def get(ds_config: str = "zero1_fp32.json", world_size: int = 2) -> Path:
        name = f"{Path(ds_config).stem}_{world_size}"
        if name not in runs:
            recipe = recipe_for(world_size, folder / f"{name}.yaml", shards, folder / name)
            assert run_ranks(world_size, train_on_rank, recipe, ds_config) == [8] * world_size
            runs[name] = folder / name
        return runs[name]

    return get


@pytest.fixture
def scene(shards, tmp_path):
    with Scene(tmp_path, shards) as scene:
        yield scene
