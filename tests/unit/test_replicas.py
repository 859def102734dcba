"""The checksum that ranks compare, against the bytes themselves, and what is said about ranks that differ."""

import hashlib

import numpy as np
import pytest
import torch

from train import replicas
from train.replicas import _describe, _strangers, checksum


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def tensor_of(dtype, count=300):
    """Bits that are random, and so of every kind: NaN, infinite, denormal, negative zero."""
    size = torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size), np.uint8)).view(dtype).flatten()


def flip(tensor, element, bit):
    """A copy in which one bit is another."""
    changed = tensor.clone()
    changed.view(torch.uint8).view(-1)[element * tensor.element_size() + bit // 8] ^= 1 << bit % 8
    return changed


@pytest.fixture(params=[7, 2**18], ids=["many pieces", "one piece"], autouse=True)
def piece(request, monkeypatch):
    monkeypatch.setattr(replicas, "_PIECE", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.float64])
def test_the_checksum_is_the_weighted_sum_of_the_bits_modulo_2_to_the_64(dtype):
    tensor = tensor_of(dtype)
    integers = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).tolist()
    expected = sum((2 * i + 1) * value for i, value in enumerate(integers)) % 2**64
    assert int(checksum(tensor)) % 2**64 == expected
    assert int(checksum(tensor.view(20, 15))) % 2**64 == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_no_flipped_bit_goes_unseen(dtype):
    tensor = tensor_of(dtype, 40)
    sums = {int(checksum(flip(tensor, element, bit))) for element in range(40) for bit in range(8 * tensor.element_size())}
    assert int(checksum(tensor)) not in sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_that_change_places_are_seen_as_their_bytes_are(dtype):
    tensor = tensor_of(dtype, 40)
    tensor[5] = tensor[30] = 1.0
    for i in range(40):
        for j in range(i):
            changed = tensor.clone()
            changed[[i, j]] = tensor[[j, i]]
            assert (checksum(changed) == checksum(tensor)) == (sha256(changed) == sha256(tensor))


def test_the_extremes_of_both_signs_change_places_far_apart():
    tensor = torch.zeros(3_000_001, dtype=torch.int32) if replicas._PIECE > 7 else torch.zeros(101, dtype=torch.int32)
    tensor[0], tensor[-1] = 2**31 - 1, -(2**31)
    assert checksum(tensor) != checksum(tensor.flip(0))


def test_empty_and_single_values_have_one():
    assert int(checksum(torch.zeros(0))) == 0
    assert int(checksum(torch.tensor(-3))) == -3
    assert int(checksum(torch.tensor([True, False, True]))) == 1 + 5


@pytest.mark.parametrize(
    ("sums", "expected"),
    [([1, 1], set()), ([1, 2], {0, 1}), ([1, 2, 1], {1}), ([1, 2, 3], {0, 1, 2}), ([1, 1, 2, 2], {0, 1, 2, 3}), ([5, 1, 1, 7, 1], {0, 3})],
)
def test_the_majority_says_which_ranks_differ_and_without_one_all_do(sums, expected):
    assert _strangers(sums) == expected


def test_a_few_parameters_are_named_and_the_rest_counted():
    odd = {"a": {1}, "b": {1}, "c": {1, 2}, "d": {1}, "e": {1}}
    hosts = ["n0", "n0", "n1", "n1", "n2"]
    assert _describe(odd, hosts).startswith("rank 1 on n0, rank 2 on n1: other values than on the other ranks, of a, b, c and 2 more. They")
    assert _describe({"a": {0, 1}}, ["n0", "n1"]).startswith(
        "rank 0 on n0, rank 1 on n1: different values of a, and no majority to tell which are right. They"
    )
