"""A release: what is in it, that it opens in five lines, and that no damaged or foreign file of it is taken for whole."""

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eval.__main__ import main
from eval.embedder import load_embedder
from eval.errors import EvalError
from eval.release import load_release
from eval.release_folder import FILES, is_release
from eval.weights import load_backbone
from model.vit import PRESETS, build_vit

D = 24  # embedding size


def faces_of_noise(b: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (b, 112, 112, 3), dtype=np.uint8)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory as training leaves it: a checkpoint of last and mean weights, its manifest, the recipe."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000012"
    checkpoint.mkdir(parents=True)
    for seed, name in enumerate(("backbone.safetensors", "backbone_ema.safetensors")):
        torch.manual_seed(seed)
        save_file(build_vit("vit_xxt", embedding_size=D).state_dict(), checkpoint / name, metadata={"preset": "vit_xxt"})
    manifest = {
        "format": 4,
        "step": 12,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in checkpoint.iterdir()},
        "data": {"images": 192, "fingerprint": {"num_images": 4321, "num_classes": 1234}},
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint.parent / "latest").write_text("step_00000012\n")
    recipe = {"output": str(tmp_path / "run"), "data": {"path": "s3://me:hunter2@host/set"}, "api_key": "hunter3", "head": {"scale": 16.0}}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "run"


@pytest.fixture
def release(run, tmp_path, capsys) -> Path:
    assert main(["release", str(run), f"{tmp_path}/out"]) == 0
    capsys.readouterr()
    return tmp_path / "out"


def result_file(path: Path, model: Path, **changes) -> str:
    embedder = load_embedder(model)
    result = {
        "protocol": "pairs",
        "model": f"{model}",
        "model_sha256": embedder.digest,
        "input_range": embedder.input_range,
        "seconds": 3.0,
        "source": "lfw",
        "images": "/home/me/images",
        "num_pairs": 600,
        "num_images": 700,
        "accuracy": {"mean": 0.87654321, "std": 0.01, "accuracies": [0.5, 0.6]},
        "accuracy_exact": {"mean": 0.88, "std": 0.02},
        "tar_at_far": [{"far_target": 0.01, "tar": 0.75, "genuine": 300, "impostor": 300}],
        "unresolved_far": [0.001],
        **changes,
    }
    path.write_text(json.dumps(result))
    return str(path)


def test_a_release_holds_the_checkpoint_byte_for_byte_and_says_what_it_is(run, release):
    assert sorted(path.name for path in release.iterdir()) == sorted([*FILES, "SHA256SUMS"])
    assert (release / "backbone.safetensors").read_bytes() == (run / "checkpoints/step_00000012/backbone.safetensors").read_bytes()
    config = json.loads((release / "config.json").read_text())
    parameters = sum(each.numel() for each in build_vit("vit_xxt", embedding_size=D).parameters())
    assert config == {
        "format": 1,
        "name": "out",
        "preset": "vit_xxt",
        "embedding_size": D,
        "network": {"width": 96, "depth": 4, "heads": 3, "patch_size": 16},
        "parameters": parameters,
        "dtype": "float32",
        "weights": "last",
        "step": 12,
        "data": {"images": 4321, "identities": 1234},
        "licence": None,
    }
    preprocessing = json.loads((release / "preprocessing.json").read_text())
    assert (preprocessing["image_size"], preprocessing["color"], preprocessing["input_range"]) == ([112, 112], "RGB", "-1..1")
    assert preprocessing["alignment"]["template"][2] == [56.0252, 71.7366]  # the nose
    assert eval(preprocessing["formula"], {"x": np.array([0, 51, 255])}).tolist() == pytest.approx([-1, -0.6, 1])


def test_all_files_of_a_release_are_as_readable_as_each_other(release):
    assert len({path.stat().st_mode for path in release.iterdir()}) == 1


def test_sha256sum_agrees(release):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=release, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name}: OK" for name in FILES]


def test_the_five_lines_of_the_card_embed_as_the_run_does(run, release):
    lines = re.search("```python\n(.*?)```", (release / "README.md").read_text(), re.DOTALL)[1].replace("OUT", str(release))
    assert len([line for line in lines.splitlines() if line]) == 5
    names = {"images": faces_of_noise(3)}
    exec(lines, names)
    expected = load_embedder(run)(names["images"])
    assert expected.shape == (3, D)
    assert np.array_equal(names["embeddings"], expected)
    np.testing.assert_allclose(np.diag(names["units"] @ names["units"].T), 1, atol=1e-6)


def test_a_release_is_a_model_like_any_other(run, release):
    images = faces_of_noise(2)
    embedder = load_embedder(release)
    assert (embedder.source, embedder.input_range) == (str(release / "backbone.safetensors"), "-1..1")
    assert np.array_equal(embedder(images), load_embedder(run)(images))
    assert embedder.digest == load_embedder(run).digest  # a result of the one is a result of the other
    assert is_release(release)
    assert not is_release(run)


def test_the_mean_weights_of_a_run_are_released_on_demand(run, tmp_path):
    assert main(["release", str(run), f"{tmp_path}/mean", "--ema"]) == 0
    expected = load_file(run / "checkpoints/step_00000012/backbone_ema.safetensors")
    found = load_release(tmp_path / "mean")
    assert found.config["weights"] == "mean"
    assert torch.equal(load_file(tmp_path / "mean" / "backbone.safetensors")["pos_embed"], expected["pos_embed"])
    assert "| weights | exponential mean over the steps of the run, step 12 |" in (tmp_path / "mean" / "README.md").read_text()


def test_the_card_tells_data_recipe_licence_and_results_without_secrets_and_folders(run, tmp_path, capsys):
    result = result_file(tmp_path / "r.json", run)
    assert main(["release", str(run), f"{tmp_path}/out", "--results", result, "--name", "Small one", "--licence", "cc-by-nc-4.0"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "license: cc-by-nc-4.0",
        "# Small one",
        "| licence of the weights | cc-by-nc-4.0 |",
        "Data: 4,321 images of 1,234 identities.",
        "### Pairs of lfw",
        "| accuracy | with exact thresholds | TAR@FAR=1e-02 | TAR@FAR=1e-03 |",
        "|---|---|---|---|",
        "| 87.65 (std 1.00) | 88.00 (std 2.00) | 75.00 | not resolved (needs 1,000 impostor pairs) |",
    ):
        assert line in card.splitlines()
    recipe = yaml.safe_load(card.split("~~~~yaml\n")[1].split("~~~~")[0])
    assert recipe == {"output": "run", "data": {"path": "s3://***@host/set"}, "api_key": "***", "head": {"scale": 16.0}}
    assert "hunter" not in card
    assert str(tmp_path) not in card
    assert "/home/me" not in card
    for name in ("backbone.safetensors", "config.json", "preprocessing.json"):
        assert f"| `{name}` | `{sha256(tmp_path / 'out' / name)}` |" in card


def test_what_is_not_known_is_not_stated(run, tmp_path):
    weights = tmp_path / "model.pt"
    torch.save({"state_dict": build_vit("vit_xxt", embedding_size=D).state_dict()}, weights)
    assert main(["release", str(weights), f"{tmp_path}/out"]) == 0
    config, card = load_release(tmp_path / "out").config, (tmp_path / "out" / "README.md").read_text()
    assert (config["step"], config["data"], config["licence"]) == (None, {"images": None, "identities": None}, None)
    for line in ("license: unknown", "Data: not stated.", "Recipe: not stated.", "| licence of the weights | not stated |"):
        assert line in card.splitlines()
    assert "None stated: nothing is known of how well these weights recognise faces." in card


# --- what is refused


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_a_missing_file_is_named(release, name):
    (release / name).unlink()
    with pytest.raises(EvalError, match=rf"{name}: missing; copy the release again"):
        load_release(release)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found_and_its_file_named(release, name):
    data = bytearray((release / name).read_bytes())
    data[len(data) // 2] ^= 1
    (release / name).write_bytes(data)
    for opens in (load_release, load_embedder, load_backbone):
        with pytest.raises(EvalError, match=rf"{name}: damaged or changed"):
            opens(release)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{'0' * 64}  ../x\n", "SHA256SUMS, line 5: expected a SHA-256 and the name of a file beside it"),
        (f"{'0' * 64}  recipe.yaml\n", r"recipe\.yaml: missing"),
        ("nonsense\n", "SHA256SUMS, line 5: expected a SHA-256 .* found 'nonsense'"),
    ],
)
def test_checksums_that_say_something_else_are_refused(release, line, message):
    sums = release / "SHA256SUMS"
    sums.write_text(sums.read_text() + line)
    with pytest.raises(EvalError, match=message):
        load_release(release)


def test_a_file_without_a_checksum_is_not_trusted(release):
    sums = release / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if "config.json" not in line))
    with pytest.raises(EvalError, match=r"SHA256SUMS: says nothing of config\.json"):
        load_release(release)


def test_a_link_that_leads_out_of_a_release_is_refused(release, tmp_path):
    shutil.move(release / "backbone.safetensors", tmp_path / "elsewhere")
    (release / "backbone.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EvalError, match=r"backbone\.safetensors: leads out of the release"):
        load_release(release)


def signed_again(release: Path) -> None:
    (release / "SHA256SUMS").write_text("".join(f"{sha256(release / name)}  {name}\n" for name in FILES))


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("config.json", "format", 2, "format: expected 1, found 2"),
        ("config.json", "preset", "vit_l", "preset: expected vit_xxt, found 'vit_l'"),
        ("config.json", "embedding_size", 512, f"embedding_size: expected {D}, found 512"),
        ("config.json", "network", {"width": 96, "depth": 4, "heads": 6, "patch_size": 16}, "network: expected .*'heads': 3.* found .*"),
        ("preprocessing.json", "color", "BGR", "color: expected RGB, found 'BGR'"),
    ],
)
def test_a_release_that_wants_another_network_or_other_pixels_is_refused(release, name, key, value, message):
    content = json.loads((release / name).read_text())
    (release / name).write_text(json.dumps({**content, key: value}))
    signed_again(release)
    with pytest.raises(EvalError, match=rf"{name}: {message}; use the version that wrote it"):
        load_release(release)


def test_heads_that_shapes_do_not_show_are_held_against_the_preset(release, monkeypatch):
    monkeypatch.setitem(PRESETS, "vit_xxt", replace(PRESETS["vit_xxt"], heads=6))
    with pytest.raises(EvalError, match=r"network: expected .*'heads': 6"):
        load_release(release)


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_json_of_another_kind_is_refused(release, content):
    (release / "config.json").write_text(content)
    signed_again(release)
    with pytest.raises(EvalError, match=r"config\.json: (expected a JSON object, found list|not a readable JSON file)"):
        load_release(release)


def test_what_is_no_release_is_said_to_be_none(run, tmp_path):
    for folder in (run, tmp_path / "nowhere"):
        with pytest.raises(EvalError, match=r"no release: expected a folder that holds backbone\.safetensors, config\.json"):
            load_release(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_sha256": "0" * 64},
            r"r\.json: a result of another model \(.*, model_sha256 000000000000\), expected [0-9a-f]{12}; measure",
        ),
        ({"model_sha256": None}, r"r\.json: a result of another model"),
        ({"protocol": None}, r"r\.json: protocol: expected pairs, ijb, mfr, found None"),
    ],
)
def test_results_of_another_model_or_none_are_refused(run, tmp_path, capsys, changes, message):
    result = result_file(tmp_path / "r.json", run, **changes)
    assert main(["release", str(run), f"{tmp_path}/out", "--results", result]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_the_manifests_are_not_released(run, tmp_path, capsys):
    save_file(build_vit("vit_xxt", embedding_size=D).state_dict(), run / "checkpoints/step_00000012/backbone.safetensors")
    assert main(["release", str(run), f"{tmp_path}/out"]) == 2
    assert "its SHA-256 is not the one in manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_no_yaml_is_named(run, tmp_path, capsys):
    (run / "recipe.yaml").write_text("a: [")
    assert main(["release", str(run), f"{tmp_path}/out"]) == 2
    assert "recipe.yaml" in capsys.readouterr().err


def test_bad_requests_are_refused_before_anything_is_written(run, release, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for words, message in (
        ([str(run), str(release)], "exists already; give --force"),
        ([str(run), str(tmp_path / "mine"), "--force"], "holds 'thesis.tex', which is no part of such an output"),
        ([str(release), f"{tmp_path}/again"], "is a release already"),
        ([str(run / "checkpoints/step_00000012/backbone.safetensors"), f"{tmp_path}/x", "--ema"], "this is no run directory"),
        ([str(run), f"{tmp_path}/x", "--name", "a\nb"], "expected one line of text"),
        ([str(tmp_path / "nowhere"), f"{tmp_path}/x"], "nowhere: no such model"),
    ):
        assert main(["release", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (run / "checkpoints/step_00000012/backbone_ema.safetensors").unlink()
    assert main(["release", str(run), f"{tmp_path}/x", "--ema"]) == 2
    assert "holds no mean weights" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_force_replaces_an_older_release(run, release, tmp_path):
    assert main(["release", str(run), str(release), "--force", "--ema"]) == 0
    assert load_release(release).config["weights"] == "mean"


def test_an_interrupted_release_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.release.checksum_lines", interrupt)
    assert main(["release", str(run), f"{tmp_path}/out"]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
