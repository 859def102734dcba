"""Exact scoring of all pairs on a GPU: every pair by itself on the CPU, and the precision of its products."""

import numpy as np
import pytest
import torch

from eval.mfr_pairs import Comparison, Images, full_float32, score_pairs
from eval.mfr_state import ScoringState
from tests.unit.test_mfr_pairs import Stopped, brute_force, labels_of, random_faces, stop_after, whole_numbers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: scoring of all pairs was not run on a GPU"),
]


@pytest.mark.parametrize("tile_size", [7, 61, None])
def test_pairs_scored_on_a_gpu_equal_every_pair_by_itself(tile_size):
    images, embeddings = Images(labels_of(61, 12), (61,)), whole_numbers(61)
    for far in (1e-3, 1e-1, 1.0):
        comparison = Comparison("all", ((0, 0),), far)
        found = score_pairs(embeddings, images, [comparison], device="cuda", tile_size=tile_size)
        assert found == {"all": brute_force(embeddings, images, comparison)}


def test_tf32_that_was_allowed_outside_is_not_used():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        vectors = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
        with full_float32(torch.device("cuda")):
            found = (vectors.cuda() @ vectors.cuda().T).cpu().double()
        exact = vectors.double() @ vectors.double().T
        assert (found - exact).abs().max() < 1e-3  # of sums up to 700; TF32 is off by 0.1
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_run_stopped_on_a_gpu_goes_on_to_the_identical_result(tmp_path):
    embeddings, images, comparisons = random_faces()
    whole = score_pairs(embeddings, images, comparisons, device="cuda", tile_size=20)
    state = ScoringState(tmp_path / "state.safetensors", 0)
    with pytest.raises(Stopped):
        score_pairs(embeddings, images, comparisons, device="cuda", tile_size=20, state=state, progress=stop_after(40))
    assert score_pairs(embeddings, images, comparisons, device="cuda", tile_size=20, state=state) == whole
    assert np.isfinite(whole["all"].threshold)
