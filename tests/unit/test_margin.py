"""Margins on the target logit, CurricularFace's negatives and UniFace's losses as pure functions. float64 unless a test says otherwise."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from model.margin import check_margin, curricular_negatives, curricular_t, margin_slope, margin_slope_in_m2, unified_margin
from model.unified_threshold import initial_bias, negative_loss, positive_loss
from tests.reference import margin_reference

MARGINS = [(1.0, 0.0, 0.4), (1.0, 0.5, 0.0), (1.0, 0.0, 0.0), (1.35, 0.0, 0.0), (4.0, 0.0, 0.0), (1.2, 0.3, 0.1)]
NEGATIVE = [(1.0, -0.4, 0.8), (1.0, -1.5, 3.0), (1.35, -0.3, 0.1)]  # what AdaFace gives good images, and with SphereFace's factor
ALL_ANGLES = torch.linspace(1e-3, math.pi - 1e-3, 4001, dtype=torch.float64)
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}  # sin(theta) is 0.05 at the least, and float64 loses no more than 1e-14 there


def a_sample_each(margin, cosine):
    """``margin`` with tensors, as norms give it, in place of its last two numbers."""
    m1, m2, m3 = margin
    return m1, torch.full_like(cosine, m2), torch.full_like(cosine, m3)


def cosines_away_from_the_joins(margin):
    """Cosines of 40 angles of all pieces of a margin, without those where a finite difference would meet two."""
    theta = torch.linspace(0.05, math.pi - 0.05, 40, dtype=torch.float64)
    angle = margin[0] * theta + margin[1]
    kept = theta[(angle.abs() > 1e-3) & ((angle - math.pi).abs() > 1e-3)]
    assert len(kept) >= 38
    return kept.cos()


@pytest.mark.parametrize("margin", MARGINS + NEGATIVE)
def test_unified_margin_matches_the_formula_entry_by_entry(margin):
    cosine = ALL_ANGLES[::40].cos()
    expected = torch.stack([margin_reference(c, margin, "exact") for c in cosine])
    torch.testing.assert_close(unified_margin(cosine, margin), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(unified_margin(cosine, a_sample_each(margin, cosine)), expected, rtol=0, atol=1e-12)


def test_every_sample_has_the_margin_of_its_own():
    cosine = torch.tensor([0.9, 0.9, -0.95, 0.2], dtype=torch.float64)
    m2 = torch.tensor([0.5, -0.6, 0.5, 0.0], dtype=torch.float64)  # between, below 0, past pi, none
    m3 = torch.tensor([0.0, 0.8, 0.1, 0.4], dtype=torch.float64)
    expected = [unified_margin(c, (1.0, float(a), float(b))) for c, a, b in zip(cosine, m2, m3, strict=True)]
    torch.testing.assert_close(unified_margin(cosine, (1.0, m2, m3)), torch.stack(expected), rtol=0, atol=1e-15)


@pytest.mark.parametrize("margin", MARGINS + NEGATIVE)
def test_unified_margin_falls_with_the_angle_and_never_folds_back(margin):
    values = unified_margin(ALL_ANGLES.cos(), margin)
    reached = margin[0] * ALL_ANGLES[:-1] + margin[1] >= 0.0
    assert (values.diff()[reached] < 0).all()
    assert values.diff().abs().max() < 0.01, "no jump where m1 theta + m2 passes 0 or pi"


@pytest.mark.parametrize("margin", NEGATIVE)
def test_a_negative_angle_ends_at_the_class_center_and_does_not_pass_it(margin):
    before = ALL_ANGLES[margin[0] * ALL_ANGLES + margin[1] < 0].cos()
    assert len(before) > 100
    assert (unified_margin(before, margin) == 1.0 - margin[2]).all()
    assert (margin_slope(before, margin, "exact") == 0.0).all()
    assert (margin_slope_in_m2(before, margin) == 0.0).all()


@pytest.mark.parametrize("margin", [(1.0, 0.5, 0.0), (1.35, 0.0, 0.0), (4.0, 0.0, 0.0), (1.2, 0.3, 0.1), (1.35, -0.3, 0.1)])
def test_past_pi_the_slope_in_the_cosine_is_one(margin):
    past = ALL_ANGLES[margin[0] * ALL_ANGLES + margin[1] > math.pi + 1e-3].cos()
    assert len(past) > 100
    assert (margin_slope(past, margin, "exact") == 1.0).all()
    torch.testing.assert_close(unified_margin(past, margin).diff(), past.diff(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("margin", MARGINS + NEGATIVE)
def test_unified_margin_passes_gradcheck_in_the_cosine_and_in_the_margin_of_a_sample(margin):
    cosine = cosines_away_from_the_joins(margin)
    _, m2, m3 = a_sample_each(margin, cosine)
    cosine, m2, m3 = (x.requires_grad_() for x in (cosine, m2, m3))
    assert gradcheck(lambda c: unified_margin(c, margin), cosine)
    assert gradcheck(lambda c, a, b: unified_margin(c, (margin[0], a, b)), (cosine, m2, m3))


@pytest.mark.parametrize("margin", MARGINS + NEGATIVE)
def test_slopes_are_the_derivatives_of_the_margin(margin):
    cosine = cosines_away_from_the_joins(margin)
    each = a_sample_each(margin, cosine)
    cosine, m2 = cosine.requires_grad_(), each[1].requires_grad_()
    in_cosine, in_m2 = torch.autograd.grad(unified_margin(cosine, each).sum(), (cosine, m2))
    for given in (margin, (margin[0], m2.detach(), each[2])):
        torch.testing.assert_close(margin_slope(cosine.detach(), given, "exact"), in_cosine, **ROUNDING)
        torch.testing.assert_close(margin_slope_in_m2(cosine.detach(), given), in_m2, **ROUNDING)
    (alone,) = torch.autograd.grad(unified_margin(cosine, margin).sum(), cosine)
    torch.testing.assert_close(alone, in_cosine, **ROUNDING)


@pytest.mark.parametrize("margin", MARGINS + NEGATIVE)
def test_straight_through_slope_is_one(margin):
    cosine = ALL_ANGLES.cos()
    assert (margin_slope(cosine, margin, "straight_through") == 1).all()
    assert (margin_slope(cosine, a_sample_each(margin, cosine), "straight_through") == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cosine", [1.0, 1.0 + 1e-6, -1.0, -1.0 - 1e-6])
@pytest.mark.parametrize("margin", MARGINS + NEGATIVE)
def test_cosines_at_and_beyond_one_stay_finite(margin, cosine, dtype):
    value = torch.tensor([cosine], dtype=dtype)
    for given in (margin, a_sample_each(margin, value)):
        variable = value.clone().requires_grad_()
        target = unified_margin(variable, given)
        (grad,) = torch.autograd.grad(target.sum(), variable)
        assert target.dtype == dtype
        # 5e-4 is the angle at which the cosine is clamped; past pi and without an angle the cosine itself goes on, by 1e-6
        inside = unified_margin(value.clamp(-1.0, 1.0), given)
        torch.testing.assert_close(target, inside, rtol=0, atol=2e-6)
        for slope in (grad, margin_slope(value, given, "exact"), margin_slope_in_m2(value, given)):
            assert slope.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", MARGINS + NEGATIVE)
def test_the_exact_slope_is_never_above_m1_times_2237(margin, dtype):
    cosine = torch.cat([1.0 - torch.logspace(-16, -1, 400, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]).to(dtype)
    slope = margin_slope(cosine, margin, "exact")
    assert (slope >= 0).all()
    assert (slope <= margin[0] * 2237).all()


@pytest.mark.parametrize(
    "margin", [(0.5, 0, 0), (1, -0.1, 0), (1, 4, 0), (1, 0, -0.1), (math.nan, 0, 0), (1, math.nan, 0), (1, 0, math.inf)]
)
def test_margins_outside_their_range_are_refused(margin):
    with pytest.raises(ValueError, match="margin must satisfy"):
        check_margin(margin)


# CurricularFace


def negatives():
    """(cosines [2, 20] that are not at the border, target [2, 1], which of them are hard)."""
    cosine = torch.linspace(-0.9, 0.9, 20, dtype=torch.float64).repeat(2, 1)
    target = torch.tensor([[0.33], [-0.21]], dtype=torch.float64)
    assert ((cosine - target).abs() > 1e-3).all()
    return cosine, target, cosine > target


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, -0.2])
def test_the_slope_of_curricular_negatives_is_their_derivative(t):
    cosine, target, _ = negatives()
    t, cosine = torch.tensor(t, dtype=torch.float64), cosine.requires_grad_()
    assert gradcheck(lambda c: curricular_negatives(c, target, t)[0], cosine)
    modulated, slope = curricular_negatives(cosine, target, t)
    (derivative,) = torch.autograd.grad(modulated.sum(), cosine)
    torch.testing.assert_close(slope, derivative, rtol=0, atol=1e-15)


def test_only_negatives_above_the_target_are_changed():
    cosine, target, hard = negatives()
    t = torch.tensor(0.3, dtype=torch.float64)
    modulated, slope = curricular_negatives(cosine, target, t)
    assert hard.any()
    assert (~hard).any()
    assert torch.equal(modulated[~hard], cosine[~hard])
    assert (slope[~hard] == 1.0).all()
    torch.testing.assert_close(modulated[hard], cosine[hard] * (0.3 + cosine[hard]), rtol=0, atol=1e-15)
    at_the_target, slope = curricular_negatives(target, target, t)
    assert torch.equal(at_the_target, target), "a negative that equals the target is not hard"
    assert (slope == 1.0).all()


def test_hard_negatives_count_for_less_early_and_for_more_late():
    cosine, target, hard = negatives()
    hard &= cosine > 0.1
    early, _ = curricular_negatives(cosine, target, torch.tensor(0.0, dtype=torch.float64))
    late, _ = curricular_negatives(cosine, target, torch.tensor(0.95, dtype=torch.float64))
    assert (early[hard] < cosine[hard]).all()
    assert (late[hard] > cosine[hard]).all()


def test_t_follows_the_mean_target_cosine_by_a_hundredth():
    t, expected = torch.zeros((), dtype=torch.float64), 0.0
    for mean in (0.5, -0.25, 0.125, 0.75):
        t, expected = curricular_t(t, torch.tensor(mean, dtype=torch.float64)), 0.01 * mean + 0.99 * expected
        assert float(t) == pytest.approx(expected, abs=1e-16)
    assert float(curricular_t(torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))) == pytest.approx(0.205)


@pytest.mark.parametrize("mean", [math.nan, math.inf, -math.inf])
def test_a_mean_that_is_not_finite_leaves_t_alone(mean):
    t = torch.tensor(0.2)  # float32, as the head keeps it
    assert torch.equal(curricular_t(t, torch.tensor(mean, dtype=torch.float64)), t)


# UniFace

BIAS = torch.tensor(11.0, dtype=torch.float64)
AROUND_BIAS = BIAS + torch.tensor([-30.0, -4.0, -1.0, 0.0, 0.5, 3.0, 20.0], dtype=torch.float64)


@pytest.mark.parametrize("loss", [positive_loss, negative_loss])
def test_the_slopes_of_unifaces_losses_are_their_derivatives(loss):
    logit, bias = AROUND_BIAS.clone().requires_grad_(), BIAS.clone().requires_grad_()
    assert gradcheck(lambda z, b: loss(z, b)[0], (logit, bias))
    value, slope = loss(logit, bias)
    in_logit, in_bias = torch.autograd.grad(value.sum(), (logit, bias))
    torch.testing.assert_close(slope, in_logit, rtol=1e-12, atol=0)
    torch.testing.assert_close(-slope.sum(), in_bias, rtol=1e-12, atol=1e-15)


def test_the_loss_of_a_sample_is_unifaces():
    positive, negatives = torch.tensor(9.5, dtype=torch.float64), torch.tensor([-20.0, 3.0, 10.0, 12.5], dtype=torch.float64)
    (at_target, pull), (at_negatives, pushes) = positive_loss(positive, BIAS), negative_loss(negatives, BIAS)
    expected = math.log(1 + math.exp(11 - 9.5)) + sum(math.log(1 + math.exp(z - 11)) for z in negatives.tolist())
    assert float(at_target + at_negatives.sum()) == pytest.approx(expected, rel=1e-14)
    step = 1e-6
    moved = math.log(1 + math.exp(11 + step - 9.5)) + sum(math.log(1 + math.exp(z - 11 - step)) for z in negatives.tolist())
    # a one-sided difference is off by half the step times the second derivative, which is a quarter an entry at the most
    assert float(-(pull + pushes.sum())) == pytest.approx((moved - expected) / step, abs=step)


def test_a_class_on_the_threshold_loses_ln_2_and_farther_on_the_right_side_less():
    for loss, sign in ((positive_loss, -1), (negative_loss, 1)):
        assert float(loss(BIAS, BIAS)[0]) == pytest.approx(math.log(2), rel=1e-15)
        value, slope = loss(AROUND_BIAS, BIAS)
        assert (sign * value.diff() > 0).all()
        assert (sign * slope > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unifaces_losses_neither_overflow_nor_lose_what_is_small(dtype):
    far = torch.tensor(1e4, dtype=dtype)
    for loss, sign in ((positive_loss, -1), (negative_loss, 1)):
        value, slope = loss(BIAS + sign * far, BIAS)
        assert float(value) == pytest.approx(1e4)
        assert float(slope) == sign
        value, _ = loss(torch.tensor(11.0 - sign * 50.0, dtype=dtype), BIAS.to(dtype))
        assert float(value) == pytest.approx(math.exp(-50.0), rel=10 * torch.finfo(dtype).eps * 50)  # exp multiplies the error by 50
        assert value.dtype == dtype


def test_a_class_at_minus_infinity_is_no_negative():
    value, slope = negative_loss(torch.tensor([-math.inf, 3.0], dtype=torch.float64), BIAS)
    assert value[0] == slope[0] == 0.0
    assert value[1] > 0.0


def test_the_bias_of_a_run_does_not_change_the_dtype_of_logits():
    value, slope = negative_loss(torch.zeros(3), BIAS)
    assert value.dtype == slope.dtype == torch.float32


@pytest.mark.parametrize("num_scored", [10, 1000, 2_000_000])
def test_untrained_negatives_lose_a_tenth_together(num_scored):
    bias = torch.tensor(initial_bias(num_scored), dtype=torch.float64)
    together = num_scored * float(negative_loss(torch.zeros((), dtype=torch.float64), bias)[0])
    assert together == pytest.approx(0.1, rel=0.01)  # n log(1 + 1 / (10 n)) is below 0.1 by 1 / (20 n) of it
