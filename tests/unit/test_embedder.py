"""The three kinds of model that evaluation opens, each against the model run by hand."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from eval.embedder import Embedder, load_embedder, module_embedder
from eval.errors import EvalError
from eval.onnx_tensors import external_files
from eval.weights import load_backbone
from model.vit import Vit, build_vit


def faces_of_noise(b: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (b, 112, 112, 3), dtype=np.uint8)


def normalised(images: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


# --- ONNX


def write_graph(path, *ops: str, batch="b", size=(3, 112, 112), dtype=TensorProto.FLOAT, outputs=3):
    """A graph of one-number operations, then the mean over each channel's pixels: output [b, 3]."""
    values = {"Sub": 127.5, "Mul": 1 / 127.5, "Div": 127.5, "Add": 0.0}
    nodes, name = [], "image"
    for index, op in enumerate(ops):
        inputs = [name, f"c_{op}"] if op in values else [name]
        nodes.append(helper.make_node(op, inputs, [f"x{index}"]))
        name = f"x{index}"
    nodes.append(helper.make_node("ReduceMean", [name, "axes"], ["embedding"], keepdims=0))
    constants = [helper.make_tensor(f"c_{op}", dtype, [], [value]) for op, value in values.items()]
    constants.append(helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3] if outputs == 3 else [1, 2]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", dtype, [batch, *size])],
        [helper.make_tensor_value_info("embedding", dtype, [batch, None])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("ops", "input_range"),
    [
        (["Sub", "Mul"], "0..255"),
        (["Sub", "Div"], "0..255"),
        (["Identity"] * 6 + ["Sub", "Mul"], "0..255"),
        ([], "-1..1"),
        (["Identity"], "-1..1"),
        (["Sub"], "-1..1"),
        (["Mul", "Sub"], "-1..1"),
        (["Identity"] * 7 + ["Sub", "Mul"], "-1..1"),  # the ninth node is too late
    ],
)
def test_a_graph_that_normalises_itself_is_told_by_its_first_nodes(tmp_path, ops, input_range):
    assert load_embedder(write_graph(tmp_path / "m.onnx", *ops)).input_range == input_range


@pytest.mark.parametrize("ops", [["Sub", "Mul"], ["Identity"]])
def test_onnx_embeddings_do_not_depend_on_who_normalises(tmp_path, ops):
    images = faces_of_noise(5)
    found = load_embedder(write_graph(tmp_path / "m.onnx", *ops), batch_size=2)(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, normalised(images).mean((2, 3)).numpy(), atol=1e-5)


def test_a_stated_input_range_beats_the_graph(tmp_path):
    path, images = write_graph(tmp_path / "m.onnx", "Identity"), faces_of_noise(2)
    np.testing.assert_allclose(load_embedder(path, "0..255")(images), images.mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_a_fixed_batch_is_padded_and_the_padding_dropped(tmp_path, count):
    embedder, images = load_embedder(write_graph(tmp_path / "m.onnx", batch=4), batch_size=64), faces_of_noise(count)
    assert embedder.batch_size == 4
    np.testing.assert_allclose(embedder(images), normalised(images).mean((2, 3)).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (3, 224, 224)}, r"expected image to be a tensor\(float\) of shape \['b', 3, 112, 112\], found tensor\(float\) of .*224"),
        ({"size": (112, 112, 3)}, r"found tensor\(float\) of \['b', 112, 112, 3\]"),
        ({"size": (3, 112, 112, 1)}, r"found tensor\(float\) of \['b', 3, 112, 112, 1\]"),
        ({"dtype": TensorProto.FLOAT16}, r"found tensor\(float16\)"),
    ],
)
def test_a_graph_with_another_input_is_refused(tmp_path, options, message):
    with pytest.raises(EvalError, match=message):
        load_embedder(write_graph(tmp_path / "m.onnx", **options))


def test_a_graph_that_returns_no_vector_per_image_is_refused(tmp_path):
    path = write_graph(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[-1].input[1] = ""  # mean over everything
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(model, path)
    with pytest.raises(EvalError, match=r"m.onnx: expected one embedding per image, \[2, D\], got shape \[\]"):
        load_embedder(path)(faces_of_noise(2))


def test_a_graph_that_fails_on_a_batch_is_named(tmp_path):
    path = write_graph(tmp_path / "m.onnx", "Add")
    model = onnx.load(path)
    constant = next(each for each in model.graph.initializer if each.name == "c_Add")
    constant.CopyFrom(helper.make_tensor("c_Add", TensorProto.FLOAT, [3, 1, 1, 1], [0.0] * 3))  # fits batches of 1 and 3 alone
    onnx.save(model, path)
    embedder = load_embedder(path)
    assert embedder(faces_of_noise(3)).shape == (3, 3)
    with pytest.raises(EvalError, match=r"m.onnx: onnxruntime can't run this graph on 2 images at once"):
        embedder(faces_of_noise(2))


# --- our own weights


@pytest.fixture
def net() -> Vit:
    torch.manual_seed(0)
    net = build_vit("vit_xxt", embedding_size=32)
    for _ in range(3):
        net(torch.rand(8, 3, 112, 112) * 2 - 1)  # running statistics that are not 0 and 1
    return net.eval()


def test_safetensors_embed_as_the_module_does(tmp_path, net):
    images = faces_of_noise(5)
    path = tmp_path / "w.safetensors"
    save_file(net.state_dict(), path, {"preset": "vit_xxt", "embedding_size": "32"})
    embedder = load_embedder(path, batch_size=2)
    assert (embedder.input_range, embedder.batch_size, embedder.source) == ("-1..1", 2, str(path))
    expected = torch.cat([net(normalised(images[i : i + 2])) for i in (0, 2, 4)]).detach().numpy()
    np.testing.assert_allclose(embedder(images), expected, atol=1e-5)


def test_weights_without_metadata_or_counters_or_in_bfloat16_are_recognised(tmp_path, net):
    state = {key: value.bfloat16() for key, value in net.state_dict().items() if "num_batches_tracked" not in key}
    save_file(state, tmp_path / "w.safetensors")
    found = load_embedder(tmp_path / "w.safetensors")(faces_of_noise(3))
    net.load_state_dict(state, strict=False)
    np.testing.assert_allclose(found, net(normalised(faces_of_noise(3))).detach().numpy(), atol=1e-5)


def test_a_run_directory_embeds_with_the_checkpoint_that_latest_names(tmp_path, net):
    checkpoints = tmp_path / "checkpoints"
    for name in ("step-10", "step-20"):
        (checkpoints / name).mkdir(parents=True)
        save_file(net.state_dict() if name == "step-20" else build_vit("vit_xt").state_dict(), checkpoints / name / "backbone.safetensors")
    (checkpoints / "latest").write_text("step-20\n")
    embedder = load_embedder(tmp_path)
    assert embedder.source == str(checkpoints / "step-20" / "backbone.safetensors")
    np.testing.assert_allclose(embedder(faces_of_noise(2)), net(normalised(faces_of_noise(2))).detach().numpy(), atol=1e-5)


def test_a_live_network_keeps_its_mode_and_its_statistics(net):
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = module_embedder(net, source="live")(faces_of_noise(2))
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    np.testing.assert_allclose(found, net.eval()(normalised(faces_of_noise(2))).detach().numpy(), atol=1e-5)


# --- what is refused


def run_with(tmp_path, pointer: str | None):
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    if pointer is not None:
        (tmp_path / "checkpoints" / "latest").write_text(pointer)
    return tmp_path


@pytest.mark.parametrize(
    ("pointer", "message"),
    [
        (None, "a run with no complete checkpoint .*latest is missing"),
        ("step-1", "a run with no complete checkpoint .*names step-1, which holds no backbone.safetensors"),
        ("step-2", "a run with no complete checkpoint .*names step-2"),
        ("", "expected the name of a folder beside it, found ''"),
        ("../../elsewhere", "expected the name of a folder beside it, found '../../elsewhere'"),
        ("..", r"expected the name of a folder beside it, found '\.\.'"),
        ("/elsewhere", "expected the name of a folder beside it, found '/elsewhere'"),
        (200 * "a/", "expected the name of a folder beside it, found '(a/){39}a$"),
    ],
)
def test_a_run_without_a_complete_checkpoint_is_refused(tmp_path, pointer, message):
    with pytest.raises(EvalError, match=message):
        load_embedder(run_with(tmp_path, pointer))


@pytest.mark.parametrize("link", ["latest", "step-1", "backbone.safetensors"])
def test_the_links_of_a_run_cannot_lead_out_of_it(tmp_path, net, link):
    run = run_with(tmp_path / "run", "step-1")
    checkpoints = run / "checkpoints"
    save_file(net.state_dict(), checkpoints / "step-1" / "backbone.safetensors")
    (tmp_path / "through-a-link").symlink_to(run)
    load_embedder(tmp_path / "through-a-link")  # the user's own
    place = checkpoints / "step-1" / link if link.endswith("s") else checkpoints / link
    place.rename(tmp_path / link)
    place.symlink_to(tmp_path / link)
    with pytest.raises(EvalError, match=rf"{link}\S*: leads out of {checkpoints}, to {tmp_path / link}\S*; copy it there, or give a"):
        load_embedder(run)


@pytest.mark.parametrize("where", ["../weights", "{folder}/weights", "link"])
def test_a_graph_cannot_read_files_elsewhere_as_its_weights(tmp_path, where):
    """onnxruntime itself sees to that."""
    (tmp_path / "model").mkdir()
    model = onnx.load(write_graph(tmp_path / "model" / "m.onnx", "Add"))
    (tmp_path / "weights").write_bytes(bytes(4))
    (tmp_path / "model" / "link").symlink_to(tmp_path / "weights")
    constant = next(each for each in model.graph.initializer if each.name == "c_Add")
    constant.CopyFrom(TensorProto(name="c_Add", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL))
    constant.external_data.add(key="location", value=where.format(folder=tmp_path))
    (tmp_path / "model" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EvalError, match=r"m\.onnx: onnxruntime can't open this graph: .*[Ee]xternal data"):
        load_embedder(tmp_path / "model" / "m.onnx")


def test_every_file_that_holds_numbers_of_a_graph_is_known_to_its_digest(tmp_path):
    """Of initializers, and of constants among the nodes."""
    model = onnx.load(write_graph(tmp_path / "m.onnx", "Add"))
    elsewhere = {name: TensorProto(name=name, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL) for name in ("a", "b")}
    for name, tensor in elsewhere.items():
        tensor.external_data.add(key="location", value=f"{name}.bin")
    model.graph.initializer.append(elsewhere["a"])
    model.graph.node.append(helper.make_node("Constant", [], ["b"], value=elsewhere["b"]))
    assert external_files(model) == ["a.bin", "b.bin"]


def test_models_that_cannot_be_opened_are_named(tmp_path):
    with pytest.raises(EvalError, match=r"nowhere.onnx: no such model"):
        load_embedder(tmp_path / "nowhere.onnx")
    for name, message in (
        ("m.onnx", "onnxruntime can't open this graph"),
        ("m.safetensors", "not a readable safetensors file"),
        ("m.pt", "not a readable file of torch.save"),
        ("m.pkl", "unknown kind of model; give a run directory .*, a release, a .safetensors, a .pt or .pth or an .onnx file"),
    ):
        (tmp_path / name).write_bytes(b"not a model at all")
        with pytest.raises(EvalError, match=f"{name}: {message}"):
            load_embedder(tmp_path / name)


def test_where_weights_alone_are_taken_no_message_recommends_a_graph(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"a graph")
    with pytest.raises(EvalError, match=r"m.onnx: unknown kind of model; give a run directory .*, a .pt or .pth$"):
        load_backbone(tmp_path / "m.onnx")


def test_a_checkpoint_that_is_given_for_its_run_is_told_which_file_to_give(tmp_path):
    (tmp_path / "backbone.safetensors").write_bytes(b"")
    with pytest.raises(EvalError, match=rf"{tmp_path}: no run directory; for the weights in it give {tmp_path}/backbone.safetensors$"):
        load_backbone(tmp_path)


def test_weights_that_fit_no_preset_or_another_than_they_say_are_refused(tmp_path, net):
    path = tmp_path / "w.safetensors"
    save_file(net.state_dict(), path, {"preset": "vit_l"})
    with pytest.raises(EvalError, match="metadata names the preset vit_l, but the weights have the shapes of vit_xxt"):
        load_embedder(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(EvalError, match=r"w.safetensors: these weights fit no preset"):
        load_embedder(path)


def test_an_input_range_that_cannot_be_right_is_refused(tmp_path, net):
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(EvalError, match=r"backbone weights take pixels in -1..1"):
        load_embedder(tmp_path / "w.safetensors", "0..255")
    with pytest.raises(EvalError, match=r"must be auto, 0..255 or -1..1, got '0..1'"):
        load_embedder(tmp_path / "w.safetensors", "0..1")
    with pytest.raises(EvalError, match="batch size must be at least 1, got 0"):
        load_embedder(tmp_path / "w.safetensors", batch_size=0)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 112, 96, 3), np.uint8), ((2, 3, 112, 112), np.uint8), ((2, 112, 112, 3), np.float32), ((0, 112, 112, 3), np.uint8)],
)
def test_an_embedder_refuses_anything_but_aligned_8_bit_images(shape, dtype):
    embedder = Embedder(lambda pixels: pixels[:, :, 0, 0], source="any", input_range="0..255")
    with pytest.raises(EvalError, match=r"expected images uint8 \[b, 112, 112, 3\] with b > 0, got"):
        embedder(np.zeros(shape, dtype))
