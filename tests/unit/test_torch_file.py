"""Weights that others saved with torch: the same embeddings as in their own network, and nothing of theirs executed."""

import argparse
import os

import numpy as np
import pytest
import torch
from torch import nn

from eval.commands.shared import open_model
from eval.embedder import load_embedder
from eval.errors import EvalError
from eval.weights import load_backbone
from model.vit import build_vit, preset_of
from tests.field_vit import SIZES, FieldVit
from train.dist import read_ranks


def faces_of_noise(b: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (b, 112, 112, 3), dtype=np.uint8)


def normalised(images: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def field_embeddings(net: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net.eval()(normalised(images)).numpy()


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return FieldVit("vit_xxt", 32).state_dict()


@pytest.mark.parametrize(("name", "embedding_size"), [("vit_xxt", 32), ("vit_t", 512), ("vit_t", 128)])
def test_weights_of_the_field_embed_as_in_the_network_that_they_come_from(tmp_path, name, embedding_size):
    torch.manual_seed(0)
    net, images = FieldVit(name, embedding_size), faces_of_noise(4)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    expected = field_embeddings(net, images)
    assert expected.std() > 0.1  # the comparison would see a term that is missing
    backbone = load_backbone(tmp_path / "model.pt")
    assert (backbone.preset, backbone.note, backbone.file) == (name, "", tmp_path / "model.pt")
    # Equal but for the order of float32 sums, through up to 12 blocks.
    np.testing.assert_allclose(load_embedder(tmp_path / "model.pt")(images), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", SIZES)
def test_keys_and_shapes_of_the_field_are_those_of_the_preset(name):
    with torch.device("meta"):
        assert preset_of(FieldVit(name).state_dict()) == name


def test_the_number_of_heads_is_the_presets_because_shapes_do_not_show_it(tmp_path, state, monkeypatch):
    monkeypatch.setitem(SIZES, "other", (96, 4, 6, 16, 49))
    torch.save(state, tmp_path / "w.pt")
    other = FieldVit("other", 32)
    other.load_state_dict(state)  # fits as well
    images = faces_of_noise(2)
    assert np.abs(load_embedder(tmp_path / "w.pt")(images) - field_embeddings(other, images)).max() > 1e-3


def test_our_own_weights_come_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    net = build_vit("vit_xxt", embedding_size=48)
    for _ in range(3):
        net(torch.rand(8, 3, 112, 112) * 2 - 1)  # running statistics that are not 0 and 1
    net.eval()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    images = faces_of_noise(3)
    loaded = load_backbone(tmp_path / "w.pt").net.eval()
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert np.array_equal(field_embeddings(loaded, images), field_embeddings(net, images))
    loaded.train()(normalised(images)).sum().backward()  # what was loaded can be trained on
    assert loaded.pos_embed.grad is not None


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state, "epoch": 3, "model": "vit_xxt"}, "under state_dict"),
        (lambda state: {"state_dict_backbone": state, "state_optimizer": {}, "global_step": 9}, "under state_dict_backbone"),
        (lambda state: {"model": state}, "under model"),
        (lambda state: {"backbone": state}, "under backbone"),
        (lambda state: {f"module.{key}": value for key, value in state.items()}, "without the prefix module."),
        (
            lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
            "under model, without the prefix module._orig_mod.",
        ),
        (lambda state: {key: value for key, value in state.items() if "num_batches_tracked" not in key}, ""),
    ],
)
def test_what_stands_around_the_weights_is_taken_off_and_told(tmp_path, state, wrap, note, suffix):
    path = tmp_path / f"w{suffix}"
    torch.save(wrap(state), path)
    backbone = load_backbone(path)
    assert backbone.note == note
    assert all(torch.equal(backbone.net.state_dict()[key], value) for key, value in state.items() if "num_batches" not in key)


def test_a_file_from_before_torch_1_6_is_read_too(tmp_path, state):
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_backbone(tmp_path / "w.pt").net.pos_embed, state["pos_embed"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, state, dtype):
    torch.save({key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}, tmp_path / "w.pt")
    found = load_backbone(tmp_path / "w.pt").net.state_dict()
    for key, value in state.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value.to(dtype).to(value.dtype) if value.is_floating_point() else value)


def test_loaded_weights_do_not_change_with_their_file(tmp_path, state):
    torch.save(state, tmp_path / "w.pt")
    net = load_backbone(tmp_path / "w.pt").net
    size = (tmp_path / "w.pt").stat().st_size
    with (tmp_path / "w.pt").open("r+b") as file:  # in place: a mapped tensor would see it
        file.write(bytes(size))
    assert torch.equal(net.pos_embed, state["pos_embed"])


def test_what_was_unwrapped_is_printed(tmp_path, state, capsys):
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    open_model(argparse.Namespace(model=tmp_path / "w.pt", input_range="auto", batch_size=4, ranks=read_ranks()))
    assert f"model {tmp_path}/w.pt (read under state_dict)\n" in capsys.readouterr().out


# --- what is refused


class Attack:
    """Makes a folder when a pickle of it is opened the usual way."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_would_run_something_is_refused_by_name_and_runs_nothing(tmp_path, state, archive):
    torch.save({"state_dict": state, "extra": Attack(tmp_path / "attacked")}, tmp_path / "w.pt", _use_new_zipfile_serialization=archive)
    with pytest.raises(
        EvalError, match=r"w\.pt: asks for posix\.mkdir, which no file of weights needs; .*Nothing of it was executed"
    ) as caught:
        load_embedder(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "attacked").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "attacked").exists()  # the attack is a real one


def test_a_whole_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(EvalError, match=r"w\.pt: asks for torch\.nn\.modules\.linear\.Linear.* save the state_dict alone"):
        load_backbone(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "found a list"),
        ({}, "found a dictionary of 0 others"),
        ({"epoch": 3, "weights": {}}, r"or a dictionary with one under state_dict, .* found a dictionary of 2 others: 'epoch' \(int\)"),
        ({"model": {"a": torch.zeros(1)}, "net": {"a": torch.zeros(1)}}, "found several: model, net; save the one that counts"),
        ({"a\nb": torch.zeros(1)}, r"'a\\nb' can't be the name of a weight"),
        ({"weight": torch.zeros(3)}, "these weights fit no preset .* 1 keys unexpected .weight.$"),
    ],
)
def test_a_file_that_holds_no_backbone_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(EvalError, match=rf"w\.pt: .*{message}"):
        load_backbone(tmp_path / "w.pt")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"not a model at all", lambda data: data[: len(data) // 2]])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, state, damage):
    torch.save(state, tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(damage((tmp_path / "w.pt").read_bytes()))
    with pytest.raises(EvalError, match=r"w\.pt: not a readable file of torch.save, .*; copy it again$") as caught:
        load_backbone(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_a_torchscript_archive_is_refused_unexecuted(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "w.pt")
    with pytest.raises(EvalError, match=r"w\.pt: a TorchScript archive, which is a program"):
        load_backbone(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(96, dtype=torch.int64), r"norm\.bias: expected float32, float16, bfloat16 or float64, found torch\.int64"),
        (torch.zeros(96, dtype=torch.complex64), r"norm\.bias: expected float32.* found torch\.complex64"),
        (torch.zeros(96).to_sparse(), r"norm\.bias: expected float32.* \(torch\.sparse_coo\)"),
        (torch.zeros(1).expand(96), r"norm\.bias: stores fewer numbers than its shape \[96\] has"),
        (torch.full((96,), torch.nan), r"norm\.bias: holds numbers that are not finite"),
        (torch.full((96,), 1e300, dtype=torch.float64), r"norm\.bias: holds numbers that are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_weight_that_holds_no_plain_numbers_is_refused(tmp_path, state, value, message):
    torch.save({**state, "norm.bias": value}, tmp_path / "w.pt")
    with pytest.raises(EvalError, match=message):
        load_backbone(tmp_path / "w.pt")


def test_a_shape_beyond_all_memory_is_refused_at_once(tmp_path, state):
    vast = {"feature.2.weight": torch.zeros(1).expand(10**12, 96)} | {
        f"feature.3.{name}": torch.zeros(1).expand(10**12) for name in ("weight", "bias", "running_mean", "running_var")
    }
    torch.save({**state, **vast}, tmp_path / "w.pt")
    with pytest.raises(EvalError, match=r"feature\.\S+: stores fewer numbers than its shape \[1000000000000"):
        load_backbone(tmp_path / "w.pt")
