"""Evaluation while a run trains: by all ranks, without a trace in what is learned, and the same as of the weights on the disk."""

import contextlib
import io
import json
import math
import re

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


def ranks_of(group):
    from train.dist import Ranks

    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return Ranks(rank, rank, world_size, world_size, torch.device("cpu"), group)


class Engine(torch.nn.Module):
    """Counts its forwards; with ``mirrored=-1`` the embedding of a mirror image is the opposite of its image's."""

    def __init__(self, mirrored=1):
        super().__init__()
        self.module, self.forwards, self.mirrored = torch.nn.Linear(1, 1), 0, mirrored

    def forward(self, images):
        self.forwards += 1
        return images.flatten(1)[:, :8] * 0 + (self.mirrored if self.forwards % 2 == 0 else 1)


def verify_while_told_to_stop(group, folder, stop_after):
    """Rank 1 is asked to stop once it has been asked ``stop_after`` times whether it is."""
    from train.config import EvalConfig
    from train.evaluation import PairVerification

    ranks, engine, asked = ranks_of(group), Engine(), iter(range(10**6))
    verification = PairVerification(EvalConfig(packs=(folder / "agedb.pairs.safetensors",)), ranks)
    problem = verification.verify_engine(3, engine, 2, lambda: ranks.rank == 1 and next(asked) >= stop_after)
    return problem, sorted(verification.newest), engine.forwards


@pytest.mark.parametrize(("stop_after", "complete"), [(0, False), (20, False), (10**6, True)])
def test_a_rank_that_is_asked_to_stop_ends_the_evaluation_on_all_after_equal_forwards(heldout, stop_after, complete):
    first, second = run_ranks(2, verify_while_told_to_stop, heldout, stop_after)
    assert first == second
    assert first[:2] == ((None, ["agedb"]) if complete else ("the run is asked to stop", []))
    assert complete or first[2] <= 32  # of 40, with the batches of one gather after the request


def train_until_asked_to_stop(group, recipe):
    """Rank 1 is asked to stop in the evaluation of step 2."""
    from train.run import Run
    from train.stop import Stopped

    evaluate, steps = Run.evaluate, []

    def asked(run):
        steps.append(run.step)
        if run.ranks.rank == 1:
            run.stop.reason = "SIGTERM"
        evaluate(run)
        assert run.verification.newest == {}

    Run.evaluate = asked
    with pytest.raises(Stopped, match=r"stopped at step 3 \(rank 1: SIGTERM\); its checkpoint is complete"):
        train_on_rank(group, recipe, "zero1_fp32.json")
    return steps


def test_a_run_that_is_asked_to_stop_while_it_is_evaluated_gives_that_up_and_saves(tmp_path, heldout):
    section = {"packs": [str(heldout / "agedb.pairs.safetensors")], "every_steps": 2}
    recipe = recipe_for(2, tmp_path / "r.yaml", packed_faces(tmp_path), tmp_path / "run", eval=section, checkpoint={"every_steps": 99})
    assert run_ranks(2, train_until_asked_to_stop, recipe) == [[2], [2]]
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000003"]


def refused(group, folder, list_of_rank_1):
    from train.config import EvalConfig
    from train.dist import RankError
    from train.evaluation import PairVerification

    ranks = ranks_of(group)
    chosen = list_of_rank_1 if ranks.rank == 1 else folder / "lfw.txt"
    with pytest.raises(RankError) as error:
        PairVerification(EvalConfig(images=folder / "images", pairs=chosen), ranks)
    return str(error.value)


def test_sets_that_differ_between_nodes_are_refused_on_all(tmp_path, heldout):
    """A rank that reads other pairs of as many images, and one that embeds fewer images than the others."""
    for number, (folds, pairs) in enumerate([(5, 10), (2, 1)]):
        path = tmp_path / str(number) / "lfw.txt"
        path.parent.mkdir()
        write_pairs(path, 20, 4, folds, pairs, seed=1, first_identity=500)
        messages = run_ranks(2, refused, heldout, path)
        assert messages == ["eval: the sets of pairs of ranks [1] are not those of rank 0: make the files equal on all nodes"] * 2


def verify_twice(group, folder, mirrored):
    """Once with a good engine, then with one whose embeddings are of no use."""
    from train.config import EvalConfig
    from train.evaluation import PairVerification

    beats = []
    ranks = ranks_of(group)
    verification = PairVerification(EvalConfig(images=folder / "images", pairs=folder / "lfw.txt"), ranks, lambda: beats.append(None))
    assert verification.verify_engine(1, Engine(), 7) is None
    assert math.isfinite(verification.score)
    problem = verification.verify_engine(2, Engine(mirrored), 7)
    return problem, len(beats), verification.newest, verification.score, verification.step


@pytest.mark.parametrize(
    ("mirrored", "expected"),
    [
        (-1, "rank 0: .*: its embedding and its mirror's add up to zero"),  # which the first rank alone finds out
        (math.nan, r".*: its embedding is zero or not finite \(7 of 7 in its batch\); check the backbone at step 2"),
    ],
)
def test_embeddings_that_cannot_be_scored_are_no_result_on_any_rank_and_forget_the_last_one(heldout, mirrored, expected):
    first, second = run_ranks(2, verify_twice, heldout, mirrored)
    assert first[0] == second[0]
    assert re.match(expected, first[0])
    assert first[1] == second[1] == 2 * 6  # 80 images: 40 for each rank, in batches of 7, two times
    for _, _, newest, score, step in (first, second):
        assert (newest, math.isnan(score), math.isnan(step)) == ({}, True, True)


def train_with_spoiled_evaluation(group, recipe):
    """At step 4 embeddings are not finite, as those of useless weights; the engine trains on undisturbed."""
    from train.evaluation import PairVerification

    verify = PairVerification.verify_engine

    def spoiled(verification, step, engine, *arguments):
        if step != 4:
            return verify(verification, step, engine, *arguments)
        hook = engine.register_forward_hook(lambda module, inputs, output: output * math.nan)
        try:
            return verify(verification, step, engine, *arguments)
        finally:
            hook.remove()

    PairVerification.verify_engine = spoiled
    with contextlib.redirect_stdout(io.StringIO()) as said:
        steps = train_on_rank(group, recipe, "zero1_fp32.json")
    return steps, said.getvalue()


def test_a_run_goes_on_when_an_evaluation_has_no_result(tmp_path, heldout):
    section = {"packs": [str(heldout / "agedb.pairs.safetensors")], "every_checkpoint": True}
    recipe = recipe_for(
        2, tmp_path / "r.yaml", packed_faces(tmp_path), tmp_path / "run", eval=section, checkpoint={"every_steps": 2, "keep_last": 9}
    )
    found = run_ranks(2, train_with_spoiled_evaluation, recipe)
    assert [steps for steps, _ in found] == [8, 8]
    warning = r"warning: the evaluation at step 4 has no result: .*: its embedding is zero or not finite .* check the backbone at step 4"
    assert [len(re.findall(warning, text)) for _, text in found] == [1, 0]
    folder = tmp_path / "run" / "checkpoints"
    scores = {path.name: json.loads((path / "manifest.json").read_text())["score"] for path in folder.glob("step_*")}
    assert scores.pop("step_00000004") is None
    assert len(scores) >= 3
    assert all(0 < score <= 1 for score in scores.values())
    steps = [json.loads(line).get("evaluation_step") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[4] is None, "the result of step 2 or 3 would be taken for that of step 4"


def verify_file(group, folder, weights) -> dict[str, float]:
    from train.config import EvalConfig
    from train.evaluation import PairVerification

    verification = PairVerification(EvalConfig(images=folder / "images", pairs=folder / "lfw.txt"), ranks_of(group))
    reports = verification.verify_file(5, weights if dist.get_rank(group) == 0 else None)  # only rank 0 has the file
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
