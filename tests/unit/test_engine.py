import sys
import types

import pytest
import torch

from model.vit import PRESETS, build_vit
from train.config import ConfigError, OptimizerConfig
from train.engine import build_optimizer, parameters_without_decay


def vit(name="vit_xxt"):
    with torch.device("meta"):
        return build_vit(name)


def test_a_missing_or_wrong_apex_is_an_error_that_says_how_to_get_the_right_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", None)  # as if not installed
    with pytest.raises(ConfigError, match=r"optimizer.impl: apex needs NVIDIA apex .* not the apex of PyPI"):
        build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(impl="apex"))


def test_torch_adamw_takes_every_setting_of_the_recipe():
    config = OptimizerConfig(lr=0.5, weight_decay=0.25, betas=(0.1, 0.2), eps=1e-3)
    (group,) = build_optimizer(torch.nn.Linear(2, 2, bias=False), config).param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.5, 0.25, (0.1, 0.2), 1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_not_decayed_are_norms_biases_and_the_two_learned_tokens(name):
    in_block = ("norm1.weight", "norm1.bias", "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias")
    blocks = {f"blocks.{block}.{parameter}" for block in range(PRESETS[name].depth) for parameter in in_block}
    others = {"pos_embed", "mask_token", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    batch_norms = {f"feature.{index}.{parameter}" for index in (1, 3) for parameter in ("weight", "bias")}
    assert parameters_without_decay(vit(name)) == blocks | others | batch_norms


class Recorder(torch.optim.AdamW):
    """Stands for an AdamW whose compiled half is not here; takes what it would be given."""

    def __init__(self, groups, *, adamw_mode=None, adam_w_mode=None, **settings):
        assert adamw_mode or adam_w_mode, "the default of apex and DeepSpeed may be L2 regularisation"
        super().__init__(groups, **settings)


@pytest.fixture(params=["torch", "deepspeed", "apex"])
def impl(request, monkeypatch):
    import deepspeed.ops.adam

    for name in ("DeepSpeedCPUAdam", "FusedAdam"):
        monkeypatch.setattr(deepspeed.ops.adam, name, Recorder)
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    apex = types.ModuleType("apex.optimizers")
    apex.FusedAdam = Recorder
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    return request.param


def test_every_parameter_is_in_exactly_one_group_and_decayed_unless_spared(impl):
    net = vit()
    optimizer = build_optimizer(net, OptimizerConfig(impl=impl, weight_decay=0.25, eps=1e-3))
    assert [(group["weight_decay"], group["eps"]) for group in optimizer.param_groups] == [(0.25, 1e-3), (0.0, 1e-3)]
    decay_of = [(id(parameter), group["weight_decay"]) for group in optimizer.param_groups for parameter in group["params"]]
    spared = parameters_without_decay(net)
    expected = [(id(parameter), 0.0 if name in spared else 0.25) for name, parameter in net.named_parameters()]
    assert sorted(decay_of) == sorted(expected)


def test_decay_all_decays_every_parameter_in_one_group(impl):
    net = vit()
    (group,) = build_optimizer(net, OptimizerConfig(impl=impl, weight_decay=0.25, decay_all=True)).param_groups
    assert group["weight_decay"] == 0.25
    assert list(map(id, group["params"])) == list(map(id, net.parameters()))
