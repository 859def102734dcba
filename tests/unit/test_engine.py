import sys

import pytest
import torch

from train.config import ConfigError, OptimizerConfig
from train.engine import build_optimizer


def test_a_missing_or_wrong_apex_is_an_error_that_says_how_to_get_the_right_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", None)  # as if not installed
    with pytest.raises(ConfigError, match=r"optimizer.impl: apex needs NVIDIA apex .* not the apex of PyPI"):
        build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(impl="apex"))


def test_torch_adamw_takes_every_setting_of_the_recipe():
    config = OptimizerConfig(lr=0.5, weight_decay=0.25, betas=(0.1, 0.2), eps=1e-3)
    (group,) = build_optimizer(torch.nn.Linear(2, 2), config).param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.5, 0.25, (0.1, 0.2), 1e-3)
