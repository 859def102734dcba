"""The ONNX file of a backbone: what stands in it, that it embeds as torch does, and that a file which does not never appears."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from PIL import Image
from safetensors.torch import save_file

from eval.__main__ import main
from eval.embedder import load_embedder
from eval.errors import EvalError
from eval.mfr_package import check_package
from eval.onnx_export import export_onnx, images_to_compare
from eval.onnx_graph import OPSETS, build_graph, store_weights_as_float16
from eval.weights import load_backbone
from model.vit import build_vit
from tests.field_vit import FieldVit

D = 40  # embedding size


def faces_of_noise(b: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (b, 112, 112, 3), dtype=np.uint8)


def normalised(images: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def saved(path: Path, name: str = "vit_xxt", embedding_size: int = D) -> Path:
    """Weights of which every one is drawn, statistics too."""
    torch.manual_seed(0)
    save_file(FieldVit(name, embedding_size).state_dict(), path)
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """(weights, the graph of them) as the command writes it by default."""
    folder = tmp_path_factory.mktemp("exported")
    weights = saved(folder / "w.safetensors")
    assert main(["export", "--model", str(weights), "--onnx", f"{folder}/m.onnx"]) == 0
    return weights, folder / "m.onnx"


@pytest.fixture
def prebuilt(exported, monkeypatch) -> Callable[[Callable[[onnx.GraphProto], None]], None]:
    """What torch's exporter made for ``exported`` serves for its weights again, changed if need be: building takes seconds."""

    def serve(change=lambda graph: None):
        def build(net, opset):
            assert opset == 14
            model = onnx.load(exported[1])
            change(model.graph)
            return model

        monkeypatch.setattr("eval.onnx_export.build_graph", build)

    return serve


def test_a_graph_is_one_checked_file_of_old_operators_with_one_input_and_one_output(exported):
    model = onnx.load(exported[1])
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 14)]
    assert (model.ir_version, len(model.functions)) == (7, 0)
    for value, name, sizes in ((model.graph.input, "image", [3, 112, 112]), (model.graph.output, "embedding", [D])):
        assert [each.name for each in value] == [name]
        tensor = value[0].type.tensor_type
        assert tensor.elem_type == TensorProto.FLOAT
        assert tensor.shape.dim[0].dim_param == "batch"
        assert [dim.dim_value for dim in tensor.shape.dim[1:]] == sizes
    about = {each.key: each.value for each in model.metadata_props}
    assert (about["preset"], about["embedding_size"], about["opset"], about["weights"]) == ("vit_xxt", str(D), "14", "float32")
    assert {tensor.data_location for tensor in model.graph.initializer} == {TensorProto.DEFAULT}


def test_every_rule_of_mfr_is_passed(exported):
    assert [rule for rule in check_package(exported[1]) if not rule.ok] == []


def test_the_graph_tells_nothing_of_the_machine_that_wrote_it(exported):
    content = exported[1].read_bytes()
    assert str(Path(__file__).resolve().parents[2]).encode() not in content
    assert b"vit.py" not in content


def test_only_nodes_that_the_network_needs_are_in_the_graph(exported):
    nodes = onnx.load(exported[1]).graph.node
    assert nodes[0].op_type == "Conv"  # nothing before it touches the pixels
    assert not {node.op_type for node in nodes} & {"Cast", "Identity", "Shape", "BatchNormalization", "Dropout", "LayerNormalization"}
    assert len(nodes) < 50 * 4  # of four blocks


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_a_graph_embeds_any_batch_as_the_fields_own_network_does(exported, batch):
    torch.manual_seed(0)
    net, images = FieldVit("vit_xxt", D).eval(), faces_of_noise(batch)
    with torch.no_grad():
        expected = net(normalised(images)).numpy()
    embedder = load_embedder(exported[1])
    assert embedder.input_range == "-1..1"
    # Equal but for the order of float32 sums.
    np.testing.assert_allclose(embedder(images), expected, atol=2e-5 * np.abs(expected).max())


def test_what_is_printed_names_images_differences_and_rules(exported, prebuilt, tmp_path, capsys):
    prebuilt()
    assert main(["export", "--model", str(exported[0]), "--onnx", f"{tmp_path}/m.onnx"]) == 0
    out = capsys.readouterr().out
    size = (tmp_path / "m.onnx").stat().st_size / 2**20
    assert f"{tmp_path}/m.onnx: {size:.1f} MiB, operator set 14, IR version 7, " in out
    assert "against torch on 32 synthetic faces:" in out
    found = re.findall(r"batch (\d+) +lowest cosine (\S+), largest difference (\S+)", out)
    assert [int(batch) for batch, _, _ in found] == [1, 8, 32]
    assert all(float(cosine) > 0.999999 and 0 < float(difference) < 1e-3 for _, cosine, difference in found)
    assert "passes MFR-Ongoing's rules for a submission" in out
    assert leftovers(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("opset", [17, OPSETS[-1]])
def test_a_later_operator_set_is_what_it_says_and_embeds_the_same(exported, tmp_path, opset):
    report = export_onnx(load_backbone(exported[0]), tmp_path / "m.onnx", faces_of_noise(32), opset=opset)
    model = onnx.load(tmp_path / "m.onnx")
    assert model.opset_import[0].version == report.opset == opset
    assert any(node.op_type == "LayerNormalization" for node in model.graph.node)
    assert [rule.rule for rule in report.notes] == ["versions"]
    images = faces_of_noise(3)
    np.testing.assert_allclose(load_embedder(tmp_path / "m.onnx")(images), load_embedder(exported[1])(images), atol=1e-4)


def test_float16_stores_half_and_keeps_input_output_and_arithmetic(exported, prebuilt, tmp_path, capsys):
    prebuilt()
    assert main(["export", "--model", str(exported[0]), "--onnx", f"{tmp_path}/half.onnx", "--fp16"]) == 0
    assert "note: no submission to MFR-Ongoing, by its rule 'weights'" in capsys.readouterr().out
    assert (tmp_path / "half.onnx").stat().st_size < 0.52 * exported[1].stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "half.onnx", providers=["CPUExecutionProvider"])
    assert [each.type for each in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2
    # The same graph with weights rounded beforehand: no other difference.
    model = onnx.load(exported[1])
    half = {each.name: each for each in onnx.load(tmp_path / "half.onnx").graph.initializer if each.data_type == TensorProto.FLOAT16}
    assert len(half) == 1 + 4 * 4 + 2  # patches, four products a block, two at the end
    for tensor in model.graph.initializer:
        if f"{tensor.name}_float16" in half:
            rounded = numpy_helper.to_array(tensor).astype(np.float16)
            assert np.array_equal(numpy_helper.to_array(half[f"{tensor.name}_float16"]), rounded)
            tensor.CopyFrom(numpy_helper.from_array(rounded.astype(np.float32), tensor.name))
    onnx.save(model, tmp_path / "rounded.onnx")
    images = faces_of_noise(3)
    expected = load_embedder(tmp_path / "rounded.onnx")(images)
    np.testing.assert_allclose(load_embedder(tmp_path / "half.onnx")(images), expected, atol=2e-5 * np.abs(expected).max())


def test_a_weight_beyond_float16_is_refused_by_name(exported):
    graph = onnx.load(exported[1]).graph
    tensor = next(each for each in graph.initializer if list(each.dims) == [96, 4 * 96])
    values = numpy_helper.to_array(tensor).copy()
    values[5, 7] = -1e5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(EvalError, match=rf"{tensor.name}: a weight of 100000 is beyond float16 \(65504\); export without --fp16"):
        store_weights_as_float16(graph)


def test_building_a_graph_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    net = build_vit("vit_xxt", embedding_size=D).eval()
    before, images = {key: value.clone() for key, value in net.state_dict().items()}, normalised(faces_of_noise(2))
    expected = net(images)
    build_graph(net, 14)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(net(images), expected)


def test_embeddings_longer_than_a_submission_may_have_are_exported_with_a_note(tmp_path):
    backbone = load_backbone(saved(tmp_path / "w.safetensors", embedding_size=520))
    report = export_onnx(backbone, tmp_path / "m.onnx", faces_of_noise(32))
    assert [rule.rule for rule in report.notes] == ["embedding size"]
    assert load_embedder(tmp_path / "m.onnx")(faces_of_noise(1)).shape == (1, 520)


# --- a graph that is wrong


def _other_weights(graph):
    tensor = next(each for each in graph.initializer if list(each.dims) == [96, 3 * 96])
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))


def _unknown_operator(graph):
    graph.node[3].op_type = "Addition"


def _two_outputs(graph):
    graph.output.append(onnx.helper.make_tensor_value_info(graph.node[0].output[0], TensorProto.FLOAT, ["batch", 96, 7, 7]))


def _fixed_batch(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32


def _normalises(graph):
    graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    nodes = [onnx.helper.make_node("Sub", ["image", "zero"], ["a"]), onnx.helper.make_node("Mul", ["a", "one"], ["b"])]
    graph.node[0].input[0] = "b"
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes + rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_weights, r"the graph embeds otherwise than the weights: lowest cosine \S+ in a batch of 1, expected 0.9999 at least"),
        (_unknown_operator, "ONNX's checker refuses the graph: .*Addition"),
        (_two_outputs, "fails the rule 'output' of MFR-Ongoing: expected exactly one"),
        (_fixed_batch, "fails the rule 'input' of MFR-Ongoing: .*the batch size dynamic"),
        (_normalises, "looks as if it normalised its input"),
    ],
)
def test_a_graph_that_fails_a_check_never_appears_and_an_older_one_stays(exported, prebuilt, tmp_path, capsys, change, message):
    prebuilt(change)
    (tmp_path / "m.onnx").write_bytes(b"older")
    assert main(["export", "--model", str(exported[0]), "--onnx", f"{tmp_path}/m.onnx"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert leftovers(tmp_path) == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"older"


def test_the_comparison_tells_how_far_a_graph_is_off(exported, prebuilt, tmp_path):
    """With an eps of LayerNorm a thousand times too large, which is too little to be refused."""

    def change(graph):
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and not tensor.dims and np.isclose(numpy_helper.to_array(tensor), 1e-5):
                tensor.CopyFrom(numpy_helper.from_array(np.float32(1e-2), tensor.name))

    prebuilt(change)
    report = export_onnx(load_backbone(exported[0]), tmp_path / "m.onnx", faces_of_noise(32))
    exact = load_embedder(exported[1])(faces_of_noise(32))
    assert np.abs(load_embedder(tmp_path / "m.onnx")(faces_of_noise(32)) - exact).max() == pytest.approx(report.difference[32], rel=0.01)
    assert report.difference[32] > 1e-3


def test_an_interrupted_export_leaves_nothing(exported, prebuilt, tmp_path, monkeypatch, capsys):
    prebuilt()

    def interrupt(*args):
        assert len(leftovers(tmp_path)) == 1  # the file under its temporary name
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.onnx_export.check_package", interrupt)
    assert main(["export", "--model", str(exported[0]), "--onnx", f"{tmp_path}/m.onnx"]) == 130
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--onnx", "{tmp}/m.pb"], "the name of the output ends in .onnx"),
        (["--onnx", "{tmp}/nowhere/m.onnx"], "no such folder"),
        (["--onnx", "{tmp}/m.onnx", "--images", "{tmp}/nowhere"], "nowhere: no such folder of images"),
        (["--onnx", "{tmp}/m.onnx", "--images", "{tmp}"], r"expected 32 images at least \(.jpg, .png, .jpeg\), found 0"),
        (["--onnx", "{tmp}/m.onnx", "--ema"], "this is no run directory"),
    ],
)
def test_bad_requests_are_refused_before_the_work(exported, tmp_path, capsys, words, message):
    assert main(["export", "--model", str(exported[0]), *(word.format(tmp=tmp_path) for word in words)]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "building" not in captured.out
    assert leftovers(tmp_path) == []


def test_the_first_images_of_a_folder_are_compared_on(tmp_path):
    faces = faces_of_noise(34)
    for number, face in enumerate(faces):
        (tmp_path / f"p{number % 3}").mkdir(exist_ok=True)
        Image.fromarray(face).save(tmp_path / f"p{number % 3}" / f"{number:02d}.png")
    images, what = images_to_compare(tmp_path)
    in_order = [number for person in range(3) for number in range(34) if number % 3 == person][:32]
    assert np.array_equal(images, faces[in_order])
    assert what == f"the first 32 images of {tmp_path}"


@pytest.mark.slow
@pytest.mark.parametrize("embedding_size", [512, 128])
def test_vit_t_is_exported(tmp_path, embedding_size):
    backbone = load_backbone(saved(tmp_path / "w.safetensors", "vit_t", embedding_size))
    report = export_onnx(backbone, tmp_path / "m.onnx", images_to_compare(None)[0])
    assert report.notes == []
    assert min(report.cosine.values()) > 0.999999
    parameters = sum(each.numel() for each in backbone.net.parameters())
    assert report.size == pytest.approx(4 * parameters, rel=0.002)


@pytest.mark.faces
def test_graph_and_torch_agree_on_real_faces(faces, tmp_path, capsys):
    weights, out = saved(tmp_path / "w.safetensors"), tmp_path / "m.onnx"
    assert main(["export", "--model", str(weights), "--onnx", str(out), "--images", str(faces / "lfw_112")]) == 0
    assert f"against torch on the first 32 images of {faces}/lfw_112:" in capsys.readouterr().out
    paths = sorted((faces / "lfw_112").rglob("*.jpg"))[-200:]
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    found, expected = load_embedder(out)(pixels).astype(float), load_embedder(weights)(pixels).astype(float)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.999999
