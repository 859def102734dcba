"""Counted operations against torch's own counter, which watches the products of a real step."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.flops import backbone_flops, backbone_forward_flops, head_flops
from model.partial_fc import PartialFC
from model.vit import PRESETS, build_vit

BATCH = 4


@pytest.mark.parametrize(("name", "mask_ratio"), [("vit_xxt", 0.0), ("vit_xxt", 0.25), ("vit_t", 0.1)])
def test_the_backbone_takes_what_torch_counts(name, mask_ratio):
    net = build_vit(name, mask_ratio=mask_ratio, embedding_size=64)
    images = torch.randn(BATCH, 3, 112, 112)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            embeddings = net(images)
        with FlopCounterMode(display=False) as backward:
            embeddings.sum().backward()
    per_image = {"mask_ratio": mask_ratio, "embedding_size": 64}
    assert forward.get_total_flops() == BATCH * backbone_forward_flops(PRESETS[name], **per_image)
    assert forward.get_total_flops() + backward.get_total_flops() == BATCH * backbone_flops(PRESETS[name], **per_image)


def addmm_flops(_total, a, b, **_):
    """Of ``total.addmm_(a, b)``, which torch's counter does not know; shapes."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize(("centers", "terms", "trained"), [("learned", 1, 1), ("pco", 2, 1), ("replace", 1, 0)])
def test_the_head_takes_what_torch_counts(centers, terms, trained):
    classes, size = 40, 16
    head = PartialFC(size, classes, margin=(1.0, 0.2, 0.0), scale=16.0, centers=centers)
    head.expectation.copy_(torch.nn.functional.normalize(torch.randn(classes, size)))
    head.expectation_seen.fill_(True)
    embeddings = torch.randn(BATCH, size, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        head(embeddings, torch.arange(BATCH)).backward()
    assert counter.get_total_flops() == head_flops(BATCH, classes, size, terms=terms, trained_terms=trained)


def test_vit_l_costs_152_gflop_an_image():
    """Six times its multiply-adds, as the field counts."""
    assert backbone_flops(PRESETS["vit_l"]) == pytest.approx(152e9, rel=0.005)
