import math

import pytest
import torch

from model.margin import check_margin, margin_slope, unified_margin
from tests.reference import margin_reference

MARGINS = [(1.0, 0.0, 0.4), (1.0, 0.5, 0.0), (1.35, 0.0, 0.0), (4.0, 0.0, 0.0), (1.2, 0.3, 0.1)]
ALL_ANGLES = torch.linspace(1e-3, math.pi - 1e-3, 4001, dtype=torch.float64)


@pytest.mark.parametrize("margin", MARGINS)
def test_unified_margin_matches_the_formula_entry_by_entry(margin):
    cosine = ALL_ANGLES[::40].cos()
    expected = torch.stack([margin_reference(c, margin, "exact") for c in cosine])
    torch.testing.assert_close(unified_margin(cosine, margin), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("margin", MARGINS)
def test_unified_margin_falls_with_the_angle_and_never_folds_back(margin):
    values = unified_margin(ALL_ANGLES.cos(), margin)
    assert (values.diff() < 0).all()
    assert values.diff().abs().max() < 0.01, "no jump where m1 theta + m2 passes pi"


@pytest.mark.parametrize("margin", MARGINS)
def test_exact_slope_is_the_derivative_of_the_margin(margin):
    cosine = torch.tensor([-0.99, -0.9, -0.5, 0.0, 0.3, 0.8, 0.99], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: unified_margin(c, margin), cosine)
    (derivative,) = torch.autograd.grad(unified_margin(cosine, margin).sum(), cosine)
    torch.testing.assert_close(margin_slope(cosine.detach(), margin, "exact"), derivative, rtol=1e-9, atol=1e-9)


def test_straight_through_slope_is_one():
    assert (margin_slope(ALL_ANGLES.cos(), (1.0, 0.5, 0.0), "straight_through") == 1).all()


@pytest.mark.parametrize("cosine", [1.0, 1.0 + 1e-6, -1.0, -1.0 - 1e-6])
@pytest.mark.parametrize("margin", MARGINS)
def test_cosines_at_and_beyond_one_stay_finite(cosine, margin):
    value = torch.tensor([cosine])
    assert unified_margin(value, margin).isfinite().all()
    assert margin_slope(value, margin, "exact").isfinite().all()


@pytest.mark.parametrize("margin", [(0.5, 0, 0), (1, -0.1, 0), (1, 4, 0), (1, 0, -0.1)])
def test_margins_outside_their_range_are_refused(margin):
    with pytest.raises(ValueError, match="margin must satisfy"):
        check_margin(margin)
