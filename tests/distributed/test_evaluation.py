"""Evaluation while a run trains: by all ranks, without a trace in what is learned, and the same as of the weights on the disk."""

import json

import pytest
import torch
import torch.distributed as dist

from data_pipeline.synthetic import write_pairs, write_synthetic
from eval.embedder import load_embedder
from eval.pair_pack import write_pack
from eval.pairs import evaluate_pairs
from eval.pairs_file import find_pairs
from tests.ranks import run_ranks
from tests.training import packed_faces, recipe_for, train_on_rank


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """Pairs of 20 people: their folder and list, and the same pairs as a pack."""
    folder = tmp_path_factory.mktemp("heldout")
    write_synthetic(folder / "images", 20, 4, seed=0, first_identity=500)
    write_pairs(folder / "lfw.txt", 20, 4, 5, 10, seed=0, first_identity=500)
    write_pack(find_pairs(folder / "images", folder / "lfw.txt"), folder / "agedb.pairs.safetensors")
    return folder


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".pt", ".safetensors")}


@pytest.mark.parametrize(("world_size", "ds_config"), [(1, "zero1_fp32.json"), (2, "zero1_bf16.json"), (2, "zero3_fp32.json")])
def test_a_run_that_is_evaluated_learns_bit_for_bit_what_it_does_without(tmp_path, heldout, world_size, ds_config):
    data = packed_faces(tmp_path)
    sections = {
        "plain": {},
        "evaluated": {
            "images": str(heldout / "images"),
            "pairs": str(heldout / "lfw.txt"),
            "packs": [str(heldout / "agedb.pairs.safetensors")],
            "every_steps": 2,
            "every_checkpoint": True,
        },
    }
    for name, section in sections.items():
        recipe = recipe_for(world_size, tmp_path / f"{name}.yaml", data, tmp_path / name, **({"eval": section} if section else {}))
        assert run_ranks(world_size, train_on_rank, recipe, ds_config) == [8] * world_size
    last = [tmp_path / name / "checkpoints" / "step_00000008" for name in sections]
    assert len({path.stat().st_mode for path in last[0].iterdir()}) == 1, "a file that others cannot read"
    backbones = [(folder / "backbone.safetensors").read_bytes() for folder in last]
    assert backbones[0] == backbones[1]
    states = [torch.load(folder / "rank_00000.pt", weights_only=True) for folder in last]
    assert torch.equal(states[0]["head"]["weight"], states[1]["head"]["weight"])
    assert all(torch.equal(states[0]["buffers"][name], buffer) for name, buffer in states[1]["buffers"].items())

    lines = [json.loads(line) for line in (tmp_path / "evaluated" / "metrics.jsonl").read_text().splitlines()]
    assert [line["evaluation_step"] for line in lines] == [None, None, 2, 3, 4, 4, 6, 6]  # logged before the evaluation of its own step
    manifests = {step: json.loads((last[1].parent / f"step_{step:08d}" / "manifest.json").read_text()) for step in (3, 4, 6, 8)}
    # In float32 the engine's weights are those on the disk: the score is what evaluating the file finds.
    if ds_config.endswith("fp32.json"):
        pairs = find_pairs(heldout / "images", heldout / "lfw.txt")
        for step, manifest in manifests.items():
            report = evaluate_pairs(load_embedder(last[1].parent / f"step_{step:08d}" / "backbone.safetensors"), pairs)
            assert manifest["score"] == pytest.approx(report.accuracy.mean, abs=1 / 100)  # a pair may lie on the threshold
    assert all(0 < manifest["score"] <= 1 for manifest in manifests.values())
    assert "score" in json.loads((last[0] / "manifest.json").read_text())


def verify_file(group, folder, weights) -> dict[str, float]:
    from train.config import EvalConfig
    from train.dist import Ranks
    from train.evaluation import PairVerification

    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    ranks = Ranks(rank, rank, world_size, world_size, torch.device("cpu"), group)
    verification = PairVerification(EvalConfig(images=folder / "images", pairs=folder / "lfw.txt"), ranks)
    reports = verification.verify_file(5, weights if rank == 0 else None)  # only rank 0 has the file
    assert verification.step == 5
    assert verification.score == reports["lfw"].accuracy.mean
    return {name: report.accuracy.accuracies for name, report in reports.items()}


def test_weights_that_rank_0_alone_has_are_evaluated_by_all(tmp_path, heldout):
    from safetensors.torch import save_file

    from model.vit import build_vit

    torch.manual_seed(0)
    save_file(build_vit("vit_xxt", embedding_size=32).state_dict(), tmp_path / "w.safetensors")
    found = run_ranks(3, verify_file, heldout, tmp_path / "w.safetensors")
    alone = evaluate_pairs(load_embedder(tmp_path / "w.safetensors"), find_pairs(heldout / "images", heldout / "lfw.txt"))
    assert found == [{"lfw": alone.accuracy.accuracies}] * 3
