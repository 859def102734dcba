"""Embedding over ranks: every image once, the same forwards on every rank, and one error on all."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eval.cache import CacheEntry, EmbeddingCache
from eval.embed import embed
from eval.embedder import Embedder
from eval.errors import EvalError
from tests.ranks import run_ranks
from tests.unit.test_embed import by_hand, encoded, of


def noise(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encoded(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8), "PNG") for _ in range(count)]


def counting(calls: list[int], file: Path | None = None) -> Embedder:
    def forward(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return pixels[:, 0, ::7, ::7].flatten(1)

    return Embedder(forward, source="counting", input_range="0..255", batch_size=2, files=[file] if file else [])


def check_shares(group: dist.ProcessGroup, count: int) -> list[int]:
    files, calls = noise(count), []
    rows = embed(counting(calls), of(files), mirror=True, group=group)
    if dist.get_rank(group) == 0:
        np.testing.assert_array_equal(rows, by_hand(files))
    else:
        assert rows is None
    return calls


@pytest.mark.parametrize(("world_size", "count"), [(1, 5), (2, 1), (2, 7), (3, 2), (3, 50)])
def test_every_image_is_embedded_once_and_ranks_run_the_same_forwards(world_size, count):
    calls = run_ranks(world_size, check_shares, count)
    assert all(each == calls[0] for each in calls)
    padded = sum(sum(each) for each in calls) // 2
    assert count <= padded < count + world_size * (1 + count // (16 * world_size))  # at most world_size - 1 repeated in a round


def check_error(group: dist.ProcessGroup, bad: int) -> str:
    files = noise(9)
    files[bad] = b"no image"
    with pytest.raises(EvalError) as error:
        embed(counting([]), of(files), mirror=True, group=group)
    return str(error.value)


@pytest.mark.parametrize("bad", [0, 8])
def test_a_bad_image_of_one_rank_is_named_on_all(bad):
    errors = run_ranks(2, check_error, bad)
    assert errors[0] == errors[1]
    assert f"face {bad}: not a readable image" in errors[0]


def check_cache(group: dist.ProcessGroup, folder: str) -> tuple[int, int]:
    files, first, second = noise(9), [], []
    model = Path(folder) / "model"
    model.write_bytes(b"weights")
    dist.barrier(group)
    cache = EmbeddingCache(Path(folder) / "cache")
    rows = embed(counting(first, model), of(files), mirror=True, group=group, cache=cache)
    again = embed(counting(second, model), of(files), mirror=True, group=group, cache=cache)
    if dist.get_rank(group) == 0:
        np.testing.assert_array_equal(rows, by_hand(files))
        np.testing.assert_array_equal(again, rows)
    else:
        assert rows is again is None
    return sum(first), sum(second)


def test_what_one_rank_has_in_its_cache_no_rank_embeds_again(tmp_path):
    assert run_ranks(2, check_cache, str(tmp_path)) == [(10, 0), (10, 0)]


def check_full_disk(group: dist.ProcessGroup, folder: str, fails: str, count: int) -> tuple[str, list[str]]:
    """The first rank's disk is full when room is taken, or when the entry is completed."""
    files, model = noise(count), Path(folder) / "model"
    model.write_bytes(b"weights")
    dist.barrier(group)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", f"{folder}/cache/x.npy")

    setattr(CacheEntry, fails, full)
    with pytest.raises(EvalError) as error:
        embed(counting([], model), of(files), mirror=True, group=group, cache=EmbeddingCache(Path(folder) / "cache"))
    return str(error.value), [path.name for path in (Path(folder) / "cache").iterdir()]


@pytest.mark.parametrize("count", [1, 70])  # images of one round, and of several
@pytest.mark.parametrize("fails", ["allocate", "commit"])
def test_a_cache_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path, fails, count):
    first, second = run_ranks(2, check_full_disk, str(tmp_path), fails, count)
    assert first[0] == second[0] == f"[Errno 28] No space left on device: '{tmp_path}/cache/x.npy'"
    assert first[1] == []
