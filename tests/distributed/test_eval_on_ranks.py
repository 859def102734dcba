"""The commands of ``python -m eval`` under a launcher: what several ranks print and write is what one does, once."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.distributed as dist

from eval.__main__ import _parser
from tests.ranks import run_ranks
from tests.training import ROOT
from tests.unit import test_mfr
from tests.unit.test_eval_cli import arguments  # noqa: F401 - a fixture
from tests.unit.test_mfr import sets, weights  # noqa: F401 - fixtures
from train.dist import RankError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eval"]


def on_ranks(words) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*TORCHRUN, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def exit_codes(stderr: str) -> set[str]:
    """In torchrun's summary; where torchrun was first to stop the others, -15."""
    return set(re.findall(r"exitcode  : (-?\d+)", stderr))


def numbers(path) -> dict:
    found = json.loads(path.read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "images_per_second")}


def test_pairs_on_two_ranks_are_those_of_one_and_are_said_once(arguments, tmp_path):  # noqa: F811
    from eval.__main__ import main

    assert main([*arguments, "--json", f"{tmp_path}/one.json"]) == 0
    done = on_ranks([*arguments, "--json", f"{tmp_path}/two.json", "--cache", f"{tmp_path}/cache"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 pairs of 21 images") == 1
    one, two = numbers(tmp_path / "one.json"), numbers(tmp_path / "two.json")
    assert one["accuracy"]["accuracies"] == two["accuracy"]["accuracies"]
    assert one.keys() == two.keys()


def test_what_is_wrong_is_said_once_and_every_rank_fails(arguments, tmp_path):  # noqa: F811
    (tmp_path / "images" / "P3" / "P3_0002.png").write_bytes(b"no image")
    done = on_ranks(arguments)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "P3_0002.png: not a readable image" in done.stderr
    assert "2" in exit_codes(done.stderr) <= {"2", "-15"}
    done = on_ranks(["pack", *arguments[3:], f"{tmp_path}/p.pairs.safetensors"])
    assert done.stderr.count("error: pack is work for one process; start it without a launcher") == 1


def write_antisymmetric(path):
    """An ONNX graph whose embedding of a mirror image is the opposite of its image's."""
    nodes = [
        onnx.helper.make_node("Slice", ["pixels", "zero", "one", "columns"], ["left"]),
        onnx.helper.make_node("Slice", ["pixels", "minus_one", "all", "columns"], ["right"]),
        onnx.helper.make_node("Sub", ["left", "right"], ["difference"]),
        onnx.helper.make_node("Flatten", ["difference"], ["embedding"]),
    ]
    numbers = {"zero": 0, "one": 1, "minus_one": -1, "all": 10**6, "columns": 3}
    constants = [onnx.numpy_helper.from_array(np.array([value]), name) for name, value in numbers.items()]
    pixels = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["b", 3, 112, 112])
    embedding = onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["b", 336])
    graph = onnx.helper.make_graph(nodes, "antisymmetric", [pixels], [embedding], constants)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8), path)


def test_what_the_first_rank_alone_finds_out_after_the_last_gather_ends_all(arguments, tmp_path):  # noqa: F811
    write_antisymmetric(tmp_path / "m.onnx")
    done = on_ranks(["pairs", "--model", f"{tmp_path}/m.onnx", *arguments[3:]])
    assert done.returncode != 0
    (line,) = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert "its embedding and its mirror's add up to zero" in line
    assert "2" in exit_codes(done.stderr) <= {"2", "-15"}
    assert "Traceback" not in done.stderr.partition(line)[0]


def run_mfr(group: dist.ProcessGroup | None, words: list[str]) -> None:
    from eval import mfr
    from train.dist import Ranks

    mfr.FAR.update(dict.fromkeys(test_mfr.SETS, 0.05))  # the protocol's own targets need a million pairs
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    args = _parser().parse_args(["mfr", "run", *words])
    args.ranks = Ranks(rank, rank, world_size, world_size, torch.device("cpu"), group)
    args.run(args)


def check_refused(group: dist.ProcessGroup, words: list[str]) -> str:
    with pytest.raises(RankError) as error:
        run_mfr(group, words)
    return str(error.value)


def test_an_output_that_the_first_rank_cannot_write_is_an_error_on_all(sets, weights, tmp_path):  # noqa: F811
    words = ["--model", str(weights), "--data", str(sets), "--state", f"{tmp_path}/no/where"]
    expected = f"rank 0: {tmp_path}/no/where: no such folder: {tmp_path}/no"
    assert run_ranks(2, check_refused, words, timeout_s=30) == [expected, expected]


def test_mfr_on_three_ranks_is_that_of_one(sets, weights, tmp_path):  # noqa: F811
    words = ["--model", str(weights), "--data", str(sets), "--batch-size", "4", "--json"]
    for world_size in (1, 3):
        run_ranks(world_size, run_mfr, [*words, str(tmp_path / f"{world_size}.json")])
    one, three = (json.loads((tmp_path / f"{world_size}.json").read_text())["sets"] for world_size in (1, 3))
    assert one.keys() == three.keys()
    for name, result in one.items():
        assert {key: result[key] for key in ("images", "genuine", "impostor")} == {
            key: three[name][key] for key in ("images", "genuine", "impostor")
        }
        assert result["tar"] == pytest.approx(three[name]["tar"], abs=1e-9)
        np.testing.assert_allclose(result["threshold"], three[name]["threshold"], atol=1e-5)  # another batch may round otherwise
