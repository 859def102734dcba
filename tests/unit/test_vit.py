"""The backbone against its equations, written again here in numpy float64, and against the table of released sizes."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.vit import PRESETS, Vit, VitPreset, accumulate_in_float32, build_vit, preset_of

SMALL = VitPreset(width=32, depth=3, heads=4)  # patch 9, as the large ones


def small_vit(*, mask_ratio=0.0, drop_path=0.0, activation_checkpointing=False, seed=0) -> Vit:
    """SMALL with weights large enough that every term matters, biases and statistics that are not 0 and 1."""
    torch.manual_seed(seed)
    net = Vit(SMALL, mask_ratio=mask_ratio, drop_path=drop_path, embedding_size=16, activation_checkpointing=activation_checkpointing)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "feature.1.weight", "feature.3.weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.2)
    return net


def images(b: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(b, 3, 112, 112, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def cast_parameters(net: Vit, dtype: torch.dtype) -> Vit:
    """What DeepSpeed does: parameters in low precision, buffers left alone."""
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype)
    return net


# --- sizes and names


@pytest.mark.parametrize(
    ("name", "million_parameters", "gmac"),
    [("vit_t", 19.14, 1.50), ("vit_s", 76.02, 5.75), ("vit_b", 113.83, 11.44), ("vit_l", 255.68, 25.34)],
)
def test_presets_have_the_parameters_and_multiplications_of_the_released_models(name, million_parameters, gmac):
    with torch.device("meta"):
        net = build_vit(name).eval()
        image = torch.empty(1, 3, 112, 112)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, 2) == million_parameters
    assert round(counter.get_total_flops() / 2 / 1e9, 2) == gmac
    assert [block.drop_path for block in net.blocks] == pytest.approx(np.linspace(0, 0.05, len(net.blocks)))


def test_state_dict_has_the_released_keys_and_shapes():
    width, depth, tokens, size = 256, 12, 144, 512
    shapes = {
        "pos_embed": (1, tokens, width),
        "mask_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, 9, 9),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "feature.0.weight": (width, tokens * width),
        "feature.2.weight": (size, width),
    }
    for layer, features in ((1, width), (3, size)):
        shapes |= {f"feature.{layer}.{key}": (features,) for key in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"feature.{layer}.num_batches_tracked"] = ()
    for block in range(depth):
        shapes |= {f"blocks.{block}.{norm}.{key}": (width,) for norm in ("norm1", "norm2") for key in ("weight", "bias")}
        shapes |= {
            f"blocks.{block}.attn.qkv.weight": (3 * width, width),
            f"blocks.{block}.attn.proj.weight": (width, width),
            f"blocks.{block}.attn.proj.bias": (width,),
            f"blocks.{block}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{block}.mlp.fc1.bias": (4 * width,),
            f"blocks.{block}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{block}.mlp.fc2.bias": (width,),
        }
    with torch.device("meta"):
        found = {key: tuple(value.shape) for key, value in build_vit("vit_t").state_dict().items()}
    assert found == shapes


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_recognised_by_its_weights(name):
    with torch.device("meta"):
        state = build_vit(name, embedding_size=64).state_dict()
    assert preset_of(state) == name
    assert preset_of({key: value for key, value in state.items() if "num_batches_tracked" not in key}) == name


def test_weights_of_no_preset_are_refused_with_all_that_differs_from_the_nearest():
    with torch.device("meta"):
        state = build_vit("vit_s", embedding_size=64).state_dict()
        del state["norm.bias"]
        state["pos_embed"] = torch.empty(1, 145, 512)
        state |= {f"head.{index}": torch.empty(1) for index in range(7)}
    with pytest.raises(ValueError) as caught:
        preset_of(state)
    assert str(caught.value) == (
        "these weights fit no preset (vit_t, vit_s, vit_b, vit_l, vit_xt, vit_xxt); nearest is vit_s with embeddings of 64: "
        "1 keys missing (norm.bias), 7 keys unexpected (head.0, head.1, head.2, head.3, head.4, and 2 more), "
        "1 keys of another shape (pos_embed: expected [1, 144, 512], found [1, 145, 512])"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_x"}, "unknown backbone 'vit_x'; choose one of vit_t"),
        ({"name": "vit_xxt", "mask_ratio": 1.0}, "mask_ratio must lie in"),
        ({"name": "vit_xxt", "mask_ratio": 0.995}, "keep at least one of 49 tokens"),
        ({"name": "vit_xxt", "mask_ratio": -0.1}, "mask_ratio must lie in"),
        ({"name": "vit_xxt", "drop_path": 1.0}, "drop_path must lie in"),
        ({"name": "vit_xxt", "embedding_size": 0}, "embedding_size must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_vit(**arguments)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must be \[b, 3, 112, 112\], got \[2, 3, 112, 96\]"):
        build_vit("vit_xxt")(torch.zeros(2, 3, 112, 96))


def test_fresh_weights_are_normal_002_with_zero_biases_and_follow_the_seed():
    torch.manual_seed(5)
    first = build_vit("vit_xt").state_dict()
    torch.manual_seed(5)
    second = build_vit("vit_xt").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key in ("pos_embed", "mask_token", "patch_embed.proj.weight", "blocks.3.attn.qkv.weight", "feature.0.weight"):
        assert first[key].std() == pytest.approx(0.02, rel=0.15), key  # mask_token has 192 values: its std scatters by 5 %
    assert all(not value.any() for key, value in first.items() if key.endswith(".bias"))


# --- the equations


def reference_forward(state: dict[str, np.ndarray], images: np.ndarray, preset: VitPreset) -> np.ndarray:
    """Equations (1) to (5), image by image and token by token, float64."""

    def layer_norm(x, key):
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / scale * state[f"{key}.weight"] + state[f"{key}.bias"]

    def batch_norm(x, key):
        scale = np.sqrt(state[f"{key}.running_var"] + 2e-5)
        return (x - state[f"{key}.running_mean"]) / scale * state[f"{key}.weight"] + state[f"{key}.bias"]

    size, side, head_dim = preset.patch_size, 112 // preset.patch_size, preset.width // preset.heads
    embeddings = []
    for image in images:
        tokens = []
        for row in range(side):
            for column in range(side):
                patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
                tokens.append(np.einsum("dcij,cij->d", state["patch_embed.proj.weight"], patch) + state["patch_embed.proj.bias"])
        z = np.stack(tokens) + state["pos_embed"][0]
        for index in range(preset.depth):
            block = f"blocks.{index}"
            qkv = layer_norm(z, f"{block}.norm1") @ state[f"{block}.attn.qkv.weight"].T
            q, k, v = np.split(qkv, 3, axis=1)
            heads = []
            for head in range(preset.heads):
                part = slice(head * head_dim, (head + 1) * head_dim)
                logits = q[:, part] @ k[:, part].T * head_dim**-0.5
                weights = np.exp(logits - logits.max(1, keepdims=True))
                heads.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
            z = z + np.concatenate(heads, axis=1) @ state[f"{block}.attn.proj.weight"].T + state[f"{block}.attn.proj.bias"]
            hidden = layer_norm(z, f"{block}.norm2") @ state[f"{block}.mlp.fc1.weight"].T + state[f"{block}.mlp.fc1.bias"]
            z = z + np.clip(hidden, 0, 6) @ state[f"{block}.mlp.fc2.weight"].T + state[f"{block}.mlp.fc2.bias"]
        c = layer_norm(z, "norm").reshape(-1)
        f = batch_norm(state["feature.0.weight"] @ c, "feature.1")
        embeddings.append(batch_norm(state["feature.2.weight"] @ f, "feature.3"))
    return np.stack(embeddings)


def test_evaluation_forward_follows_the_equations():
    net, x = small_vit().eval(), images(3)
    state = {key: value.double().numpy() for key, value in net.state_dict().items()}
    expected = reference_forward(state, x.double().numpy(), SMALL)
    found = net(x)
    assert found.dtype == torch.float32
    assert np.linalg.norm(found.detach().numpy() - expected) < 1e-5 * np.linalg.norm(expected)


def test_the_last_four_rows_and_columns_are_never_read():
    net, x = small_vit().eval(), images(2)
    changed = x.clone()
    changed[:, :, 108:] = 7
    changed[:, :, :, 108:] = -7
    assert torch.equal(net(x), net(changed))
    changed[:, :, 107, 107] = 7
    assert not torch.equal(net(x), net(changed))


def test_evaluation_is_deterministic_and_training_is_not():
    net, x = small_vit(mask_ratio=0.3, drop_path=0.5), images(4)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    # one image alone embeds as it does in a batch: nothing in evaluation looks across images
    torch.testing.assert_close(net(x[:1]), net(x)[:1], rtol=1e-4, atol=1e-4)


# --- randomness of training


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.05, 137), (0.1, 130), (0.5, 72), (0.75, 36)])
def test_patch_dropping_keeps_the_stated_share_and_fills_the_rest_with_the_mask_token(mask_ratio, kept):
    net, seen = small_vit(mask_ratio=mask_ratio), {}
    net.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.update(entered=inputs[0].detach()))
    net.norm.register_forward_pre_hook(lambda module, inputs: seen.update(left=inputs[0].detach()))
    x = images(4)
    net(x)
    assert kept == round((1 - mask_ratio) * 144)
    assert seen["entered"].shape == (4, kept, SMALL.width)
    assert seen["left"].shape == (4, 144, SMALL.width)
    dropped = (seen["left"] == net.mask_token.detach()).all(-1)
    assert (dropped.sum(1) == 144 - kept).all()
    assert len({tuple(row.tolist()) for row in dropped}) == 4  # a subset of its own for each image

    tokens = (net.patch_embed["proj"](x) + net.pos_embed).detach()
    for image in range(4):  # what entered is exactly the tokens of the places that were not dropped
        order = {tuple(token.tolist()) for token in seen["entered"][image]}
        assert order == {tuple(token.tolist()) for token in tokens[image][~dropped[image]]}
    net.eval()(x)
    assert seen["entered"].shape[1] == 144


def test_every_place_is_dropped_equally_often():
    net, seen = small_vit(mask_ratio=0.25), []
    net.blocks = torch.nn.ModuleList()
    net.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    for _ in range(40):
        net(images(25))
    dropped = (torch.cat(seen) == net.mask_token.detach()).all(-1).sum(0)
    # binomial(1000, 0.25): standard deviation 13.7; 144 places stay within 5 of them
    assert (dropped - 250).abs().max() < 5 * 13.7


def test_kept_tokens_return_to_their_own_places():
    net = small_vit(mask_ratio=0.5)
    net.blocks = torch.nn.ModuleList()
    seen = {}
    net.norm.register_forward_pre_hook(lambda module, inputs: seen.update(left=inputs[0].detach()))
    x = images(2)
    net(x)
    tokens = (net.patch_embed["proj"](x) + net.pos_embed).detach()
    kept = ~(seen["left"] == net.mask_token.detach()).all(-1)
    assert torch.equal(seen["left"][kept], tokens[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_drops_a_branch_of_an_image_at_its_rate_and_keeps_the_expectation(dtype):
    block = small_vit(drop_path=0.4).blocks[-1]
    x = torch.full((20_000, 1, 2), 1.0, dtype=dtype)
    branch = torch.full_like(x, 3.0)
    added = (block.add(x, branch) - x).float()
    assert set(added.unique().tolist()) == {0.0, 5.0}  # 3 / (1 - 0.4)
    assert (added[..., 0] == added[..., 1]).all()
    assert (added == 0).float().mean().item() == pytest.approx(0.4, abs=0.02)  # 5.8 standard deviations of 0.0035
    block.eval()
    assert torch.equal(block.add(x, branch), x + branch)


def test_drop_path_rises_linearly_from_zero():
    assert [block.drop_path for block in small_vit(drop_path=0.3).blocks] == pytest.approx([0, 0.15, 0.3])


# --- checkpointing and precision


def gradients(net: Vit, x: torch.Tensor, seed: int = 3) -> dict[str, torch.Tensor]:
    """Gradients of a fixed projection of the embeddings, and the embeddings under the key "embeddings"."""
    torch.manual_seed(seed)
    embeddings = net(x)
    (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings).sin()).sum().backward()
    return {"embeddings": embeddings.detach()} | {key: parameter.grad for key, parameter in net.named_parameters()}


def test_activation_checkpointing_changes_no_bit_of_gradients_and_statistics():
    plain = small_vit(mask_ratio=0.25, drop_path=0.5)
    recomputed = small_vit(mask_ratio=0.25, drop_path=0.5, activation_checkpointing=True)
    x, calls = images(6), []
    recomputed.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    expected, found = gradients(plain, x), gradients(recomputed, x)
    assert len(calls) == 2
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(left, right) for left, right in zip(plain.buffers(), recomputed.buffers(), strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.01)])  # measured: 0.018 and 0.006
def test_low_precision_training_errs_no_more_than_plain_torch_and_statistics_stay_float32(dtype, tolerance, monkeypatch):
    def trained(dtype: torch.dtype) -> tuple[Vit, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        net = cast_parameters(build_vit("vit_xxt", mask_ratio=0.2, drop_path=0.2), dtype)
        return net, gradients(net, images(16))

    exact_net, exact = trained(torch.float32)
    net, found = trained(dtype)
    monkeypatch.setattr("model.vit.accumulate_in_float32", lambda product, *operands: product(*operands))
    _, plain = trained(dtype)

    total = torch.cat([gradient.flatten() for gradient in exact.values()]).norm()
    errors = {key: (found[key] - exact[key]).norm() for key in exact}
    assert torch.stack(list(errors.values())).norm() < tolerance * total
    for key, error in errors.items():
        assert found[key].dtype == (torch.float32 if key == "embeddings" else dtype)
        # The floor is for gradients that BatchNorm makes 0 (norm.bias, feature.1.bias): both sides are rounding alone.
        assert error < 1.5 * (plain[key] - exact[key]).norm() + 1e-3 * total, key
    for (key, left), right in zip(net.named_buffers(), exact_net.buffers(), strict=True):
        assert left.dtype == right.dtype != dtype
        # One update moves a statistic by a tenth of what the batch says, and BatchNorm makes some of what it says 0.
        torch.testing.assert_close(left, right, rtol=tolerance, atol=0.1 * tolerance, msg=lambda text, key=key: f"{key}: {text}")


def test_low_precision_products_on_the_cpu_round_once():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in ((8, 4096), (16, 4096)))
    product = accumulate_in_float32(torch.nn.functional.linear, x, weight)
    assert torch.equal(product, (x.double() @ weight.double().T).float().bfloat16())  # float64 sums, rounded once
    product.sum().backward()
    assert torch.equal(weight.grad, x.detach().double().sum(0).bfloat16().expand(16, -1))
    assert x.grad.dtype == torch.bfloat16


def test_batch_norm_refuses_statistics_that_were_cast():
    with pytest.raises(TypeError, match="statistics must stay float32, found"):
        build_vit("vit_xxt").bfloat16()(images(2))
