"""The rules of MFR-Ongoing for a submission: a package that keeps them all, and one for each way to break one."""

import re
import stat
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from eval.errors import EvalError
from eval.mfr_package import EXPECTED, RuleResult, check_package
from model.vit import build_vit

CHANNELS = 3


def tiny_model(
    *,
    ops=("Identity",) * 6,
    names=None,
    embedding_size=8,
    batch="b",
    size=(CHANNELS, 112, 112),
    dtype=TensorProto.FLOAT,
    outputs=("embedding",),
    constants=(),
    extra_nodes=(),
    opset=14,
    ir_version=7,
) -> onnx.ModelProto:
    """Six nodes that change nothing (or ``ops``), the mean over each channel's pixels, times a matrix: [b, embedding_size]."""
    numbers = {"Sub": 127.5, "Mul": 1 / 127.5, "Div": 127.5}
    nodes, value = list(extra_nodes), "image"
    for index, op in enumerate(ops):
        inputs = [value, f"c_{op}"] if op in numbers else [value]
        nodes.append(helper.make_node(op, inputs, [f"x{index}"], name=names[index] if names else ""))
        value = f"x{index}"
    nodes.append(helper.make_node("ReduceMean", [value], ["mean"], axes=[2, 3], keepdims=0))
    nodes += [helper.make_node("MatMul", ["mean", "weight"], [output]) for output in outputs]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", dtype, [batch, *size])],
        [helper.make_tensor_value_info(output, dtype, [batch, None]) for output in outputs],
        [
            helper.make_tensor("weight", dtype, [size[0], embedding_size], np.ones(size[0] * embedding_size)),
            *(helper.make_tensor(f"c_{op}", dtype, [], [number]) for op, number in numbers.items()),
            *constants,
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def failures(results: list[RuleResult]) -> dict[str, str]:
    """Rule -> what was found, of those that failed, without those that could not be checked."""
    return {each.rule: each.found for each in results if not each.ok and not each.found.startswith("not checked")}


def checked(tmp_path, model: onnx.ModelProto) -> dict[str, str]:
    onnx.save(model, tmp_path / "model.onnx")
    return failures(check_package(tmp_path / "model.onnx"))


def zipped(path, members: dict[str, bytes], compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# --- packages that keep the rules


def test_a_package_that_keeps_every_rule_is_proved_rule_by_rule(tmp_path):
    results = check_package(zipped(tmp_path / "p.zip", {"model.onnx": tiny_model().SerializeToString()}))
    assert [each.rule for each in results] == list(EXPECTED)
    assert all(each.ok for each in results), failures(results)
    assert {each.rule: each.found for each in results}["batch 32"] == "float32 [32, 8]"


def test_a_bare_model_is_held_to_the_same_rules_but_that_of_the_zip(tmp_path):
    onnx.save(tiny_model(), tmp_path / "model.onnx")
    results = check_package(tmp_path / "model.onnx")
    assert [each.rule for each in results] == [rule for rule in EXPECTED if rule != "package"]
    assert all(each.ok for each in results), failures(results)


@pytest.mark.filterwarnings("ignore")  # that exporter is the old one, which still writes operator set 14
def test_our_network_exported_for_their_onnxruntime_keeps_every_rule(tmp_path):
    torch.manual_seed(0)
    net = build_vit("vit_xxt", embedding_size=32).eval()
    image, axes = torch.zeros(2, CHANNELS, 112, 112), {"image": {0: "b"}, "embedding": {0: "b"}}
    options = {"input_names": ["image"], "output_names": ["embedding"], "dynamic_axes": axes, "opset_version": 14, "dynamo": False}
    torch.onnx.export(net, (image,), tmp_path / "model.onnx", **options)
    assert failures(check_package(tmp_path / "model.onnx")) == {}


# --- one broken rule each


@pytest.mark.parametrize(
    ("change", "rule", "found"),
    [
        ({"opset": 15}, "versions", "ai.onnx 15, IR 7"),
        ({"ir_version": 8}, "versions", "ai.onnx 14, IR 8"),
        ({"ops": ["Identity"] * 5}, "nodes", "7"),
        ({"ops": ["Sub", "Mul", *["Identity"] * 4]}, "normalisation", "would normalise what the server has normalised"),
        ({"ops": ["Identity"] * 4 + ["Sub", "Div"]}, "normalisation", "would normalise what"),
        (
            {"names": ["Sub_1", "a", "b", "Mul_2", "c", "d"]},
            "normalisation",
            "nodes named 'Sub_1' and 'Mul_2': the server would feed it 0..255",
        ),
        ({"names": ["_mulscalar0", "_minusscalar0", "a", "b", "c", "d"]}, "normalisation", "'_minusscalar0' and '_mulscalar0'"),
        ({"embedding_size": 513}, "embedding size", "513"),
        ({"outputs": ("embedding", "again")}, "output", "embedding: .*; again: "),
        ({"batch": 32}, "input", r"image: tensor\(float\) \[32, 3, 112, 112\]"),
        ({"size": (CHANNELS, 112, 96)}, "input", r"\['b', 3, 112, 96\]"),
        ({"size": (CHANNELS, 112, "w")}, "input", r"\['b', 3, 112, 'w'\]"),
        ({"size": (1, 112, 112)}, "input", r"\['b', 1, 112, 112\]"),
    ],
)
def test_each_broken_rule_fails_alone_and_is_named(tmp_path, change, rule, found):
    failed = checked(tmp_path, tiny_model(**change))
    assert list(failed) == [rule]
    assert re.search(found, failed[rule])


def test_names_and_types_that_do_not_normalise_are_left_alone(tmp_path):
    assert checked(tmp_path, tiny_model(names=["Sub_1", "Sub_2", "a", "b", "c", "d"])) == {}  # no Mul
    assert checked(tmp_path, tiny_model(ops=["Identity"] * 8 + ["Sub", "Mul"], names=[*"abcdefgh", "Sub_8", "Mul_9"])) == {}  # too late
    assert checked(tmp_path, tiny_model(ops=["Mul", "Sub"] + ["Identity"] * 4)) == {}


def test_float16_weights_are_refused_wherever_they_hide(tmp_path):
    half = helper.make_tensor("half", TensorProto.FLOAT16, [2], [1.0, 2.0])
    assert checked(tmp_path, tiny_model(constants=[half])) == {"weights": "1 are float16, the first is 'half'"}
    constant = helper.make_node("Constant", [], ["unused"], value=half)
    assert checked(tmp_path, tiny_model(extra_nodes=[constant])) == {"weights": "1 are float16, the first is 'half'"}
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["in_branch"], value=half)],
        "branch",
        [],
        [helper.make_tensor_value_info("in_branch", TensorProto.FLOAT16, [2])],
    )
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    nodes = [
        helper.make_node("Constant", [], ["condition"], value=yes),
        helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch),
    ]
    assert checked(tmp_path, tiny_model(extra_nodes=nodes)) == {"weights": "2 are float16, the first is 'half'"}


@pytest.mark.parametrize("name", ["double", "int8", "bfloat16"])
def test_initializers_of_other_floats_or_of_few_bytes_are_refused(tmp_path, name):
    odd = helper.make_tensor("odd", TensorProto.DataType.Value(name.upper()), [1], [1])
    assert checked(tmp_path, tiny_model(constants=[odd])) == {"weights": f"1 are {name}, the first is 'odd'"}
    assert checked(tmp_path, tiny_model(constants=[helper.make_tensor("index", TensorProto.INT64, [1], [1])])) == {}


def test_a_model_of_another_number_type_is_refused(tmp_path):
    failed = checked(tmp_path, tiny_model(dtype=TensorProto.FLOAT16))
    assert failed["weights"].startswith("4 are float16")
    assert "tensor(float16)" in failed["input"]


def test_weights_in_another_file_are_refused_and_not_looked_for(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(4 * CHANNELS * 8))
    model = tiny_model()
    weight = next(each for each in model.graph.initializer if each.name == "weight")
    weight.CopyFrom(TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[CHANNELS, 8], data_location=TensorProto.EXTERNAL))
    weight.external_data.add(key="location", value="secret")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    results = check_package(tmp_path / "model.onnx")
    assert failures(results) == {"one file": "1 tensors lie elsewhere, the first is 'weight'"}
    assert [each.found for each in results if each.rule == "batch 1"] == ["not checked: see one file"]


def test_embeddings_that_are_not_finite_are_counted_in_each_batch(tmp_path):
    model = tiny_model(constants=[helper.make_tensor("nan", TensorProto.FLOAT, [], [np.nan])])
    model.graph.node.append(helper.make_node("Add", ["embedding", "nan"], ["bad"]))
    model.graph.output[0].name = "bad"
    assert checked(tmp_path, model) == {"batch 1": "1 of 1 embeddings are not finite", "batch 32": "32 of 32 embeddings are not finite"}


def test_a_graph_that_takes_one_batch_size_alone_is_refused(tmp_path):
    model = tiny_model(constants=[helper.make_tensor("shift", TensorProto.FLOAT, [31, 1], [0.0] * 31)])
    model.graph.node.append(helper.make_node("Add", ["embedding", "shift"], ["bad"]))
    model.graph.output[0].name = "bad"
    failed = checked(tmp_path, model)
    assert sorted(failed) == ["batch 1", "batch 32"]
    assert failed["batch 1"] == "float32 [31, 8]"
    assert "Add" in failed["batch 32"]


def test_a_graph_that_returns_no_vector_per_image_is_refused(tmp_path):
    model = tiny_model()
    model.graph.node.append(helper.make_node("ReduceSum", ["embedding"], ["bad"], keepdims=0))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("bad", TensorProto.FLOAT, []))
    assert checked(tmp_path, model) == {"batch 1": "float32 []", "batch 32": "float32 []"}


def test_what_is_no_graph_fails_and_stops_the_rules_after_it(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model at all")
    results = check_package(tmp_path / "model.onnx")
    assert list(failures(results)) == ["format"]
    assert not any(each.ok for each in results if each.rule != "size")


def test_a_model_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.mfr_package.MAX_BYTES", 100)
    assert list(checked(tmp_path, tiny_model())) == ["size"]


# --- the zip


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({}, "0 files: "),
        ({"model.onnx": b"", "readme.txt": b""}, "2 files: 'model.onnx', 'readme.txt'"),
        ({"folder/model.onnx": b""}, "1 files: 'folder/model.onnx'"),
        ({"../model.onnx": b""}, r"1 files: '../model.onnx'"),
        ({"/model.onnx": b""}, r"1 files: '/model.onnx'"),
        ({"model.pt": b""}, "1 files: 'model.pt'"),
    ],
)
def test_a_zip_of_anything_but_one_model_at_its_root_is_refused(tmp_path, members, found):
    assert failures(check_package(zipped(tmp_path / "p.zip", members))) == {"package": found}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["p.zip"]


def test_a_link_in_a_zip_is_no_model(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        link = zipfile.ZipInfo("model.onnx")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/hostname")
    assert list(failures(check_package(tmp_path / "p.zip"))) == ["package"]


def test_a_zip_that_would_unpack_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.mfr_package.MAX_BYTES", 1 << 20)
    bomb = zipped(tmp_path / "p.zip", {"model.onnx": bytes(2 << 20)})
    assert bomb.stat().st_size < 10_000
    assert failures(check_package(bomb)) == {"size": "2.0 MiB, says the zip; it was not unpacked"}


def test_a_zip_that_states_too_small_a_size_is_not_unpacked_beyond_it(tmp_path):
    content = zipped(tmp_path / "p.zip", {"model.onnx": bytes(2 << 20)}).read_bytes()
    lie = content.replace((2 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    assert lie != content
    (tmp_path / "p.zip").write_bytes(lie)
    failed = failures(check_package(tmp_path / "p.zip"))
    assert list(failed) == ["package"]
    assert "Bad CRC-32" in failed["package"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_packed_by_unusual_means_is_refused(tmp_path, compression):
    path = zipped(tmp_path / "p.zip", {"model.onnx": tiny_model().SerializeToString()}, compression)
    assert list(failures(check_package(path))) == ["package"]


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: b"no zip", lambda data: data[:60] + b"\0" * 40 + data[100:]])
def test_a_damaged_zip_is_refused(tmp_path, damage):
    path = zipped(tmp_path / "p.zip", {"model.onnx": tiny_model().SerializeToString()})
    path.write_bytes(damage(path.read_bytes()))
    failed = failures(check_package(path))
    assert list(failed) == ["package"]
    assert failed["package"].startswith("not readable as a zip: ")


def test_what_is_neither_zip_nor_model_is_refused_by_name(tmp_path):
    with pytest.raises(EvalError, match=r"m\.pt: expected a submission, NAME\.zip, or the NAME\.onnx for it"):
        check_package(tmp_path / "m.pt")
    with pytest.raises(EvalError, match=r"m\.zip: no such file"):
        check_package(tmp_path / "m.zip")
