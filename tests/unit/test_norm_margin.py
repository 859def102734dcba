"""AdaFace's and MagFace's margins as functions of the norm, float64 unless a test says otherwise."""

import math
import statistics
import warnings

import pytest
import torch
from torch.autograd import gradcheck

from model.margin import margin_slope, margin_slope_in_m2, unified_margin
from model.norm_margin import AdaFace, MagFace, NormStatistics, adaface_margin, magface_margin, magface_penalty, next_norm_statistics
from tests.reference import adaface_reference, magface_reference

ANGLES = torch.linspace(1e-3, math.pi - 1e-3, 2001, dtype=torch.float64)
SCALE = 64.0
MAG = MagFace()
RANGE = (MAG.l_a, MAG.u_a)
INSIDE = torch.linspace(MAG.l_a, MAG.u_a, 501, dtype=torch.float64)
OUTSIDE = torch.tensor([0.0, 1e-12, 3.0, 9.9, 110.1, 500.0, math.inf], dtype=torch.float64)


def norm_statistics(mean=20.0, std=5.0, dtype=torch.float64):
    return NormStatistics(torch.tensor(mean, dtype=dtype), torch.tensor(std, dtype=dtype))


def norms_of_quality(quality):
    """Norms at which AdaFace(h=1.0) under :func:`norm_statistics` finds this quality; 1e-3 is what it adds to std."""
    return 20.0 + torch.as_tensor(quality, dtype=torch.float64) * (5.0 + 1e-3)


# AdaFace


def test_poor_images_get_arcface_mean_ones_cosface_and_good_ones_a_negative_angle():
    m2, m3 = adaface_margin(norms_of_quality([-1.0, 0.0, 1.0]), norm_statistics(), 0.4, 1.0)
    torch.testing.assert_close(m2, torch.tensor([0.4, 0.0, -0.4], dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(m3, torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64), rtol=0, atol=1e-15)


def test_quality_is_clipped_beyond_one_deviation_over_h():
    norm = torch.tensor([0.0, 1e-9, 4.0, 31.0, 99.0, 1e6, math.inf], dtype=torch.float64)
    m2, m3 = adaface_margin(norm, norm_statistics(), 0.4, 1.0)
    assert m2.tolist() == [0.4] * 3 + [-0.4] * 4
    assert m3.tolist() == [0.0] * 3 + [0.8] * 4


def test_h_says_how_much_of_a_deviation_counts():
    m2, _ = adaface_margin(torch.tensor([25.001], dtype=torch.float64), norm_statistics(), 0.4, 0.333)
    assert float(m2) == pytest.approx(-0.4 * 0.333, rel=1e-12)


def test_adaface_matches_the_formula_sample_by_sample():
    norm = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 60.0
    moved = next_norm_statistics(norm_statistics(25.0, 9.0), norm)
    m2, m3 = adaface_margin(norm, moved, 0.4, 0.333)
    reference = adaface_reference(0.4, 0.333, 25.0, 9.0)
    expected = torch.tensor([reference(n, norm)[0] for n in norm], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([torch.ones_like(m2), m2, m3], 1), expected, rtol=0, atol=1e-14)
    assert AdaFace(0.4, 0.333).of(norm, moved).margin[1].equal(m2)


@pytest.mark.parametrize("quality", [-1.0, -0.4, 0.0, 0.6, 1.0])
def test_adaface_passes_gradcheck_in_the_cosine(quality):
    theta = torch.linspace(0.05, math.pi - 0.05, 30, dtype=torch.float64)
    m2, m3 = adaface_margin(norms_of_quality(quality).expand(30), norm_statistics(), 0.4, 1.0)
    away_from_joins = ((theta + m2).abs() > 1e-3) & ((theta + m2 - math.pi).abs() > 1e-3)
    m2, m3, cosine = m2[away_from_joins], m3[away_from_joins], theta[away_from_joins].cos().requires_grad_()
    assert gradcheck(lambda c: unified_margin(c, (1.0, m2, m3)), cosine)
    (derivative,) = torch.autograd.grad(unified_margin(cosine, (1.0, m2, m3)).sum(), cosine)
    torch.testing.assert_close(margin_slope(cosine.detach(), (1.0, m2, m3), "exact"), derivative, rtol=1e-9, atol=1e-9)


def test_adafaces_margin_gives_the_norm_no_gradient():
    norm = torch.tensor([14.0, 18.0, 22.0], dtype=torch.float64, requires_grad=True)
    m2, m3 = adaface_margin(norm, norm_statistics(), 0.4, 1.0)
    assert m2[0] > m2[1] > m2[2], "it does depend on the norm"
    assert not m2.requires_grad
    assert not m3.requires_grad
    sample = AdaFace().of(norm, norm_statistics())
    assert sample.m2_slope is sample.penalty is sample.penalty_slope is None


@pytest.mark.parametrize("quality", [-1.0, -0.4, 0.0, 0.6, 1.0])
def test_the_target_under_adaface_falls_with_the_angle(quality):
    m2, m3 = adaface_margin(norms_of_quality(quality).expand_as(ANGLES), norm_statistics(), 0.4, 1.0)
    change = unified_margin(ANGLES.cos(), (1.0, m2, m3)).diff()
    reached = (ANGLES + m2)[:-1] >= 0.0
    assert (change[reached] < 0).all()
    assert (change <= 0).all()
    assert change.abs().max() < 0.01, "no jump"


def test_hard_samples_weigh_more_among_good_images_and_less_among_poor_ones():
    theta = torch.linspace(0.45, math.pi - 0.45, 200, dtype=torch.float64)  # past the plateau of m2 = -0.4, before the join of 0.4
    weights = {}
    for quality in (-1.0, 0.0, 1.0):
        m2, m3 = adaface_margin(norms_of_quality(quality).expand_as(theta), norm_statistics(), 0.4, 1.0)
        weights[quality] = margin_slope(theta.cos(), (1.0, m2, m3), "exact")
    assert (weights[-1.0].diff() < 0).all()
    torch.testing.assert_close(weights[0.0], torch.ones_like(theta), rtol=0, atol=1e-12)
    assert (weights[1.0].diff() > 0).all()


# AdaFace's statistics


def test_statistics_move_by_a_hundredth_of_a_batch():
    moved = next_norm_statistics(norm_statistics(20.0, 100.0), torch.tensor([10.0, 14.0], dtype=torch.float64))
    assert float(moved.mean) == pytest.approx(19.92, rel=1e-14)  # 0.99 * 20 + 0.01 * 12
    assert float(moved.std) == pytest.approx(99.0 + 0.01 * math.sqrt(8.0), rel=1e-14)


def test_statistics_of_many_steps_are_a_plain_exponential_mean():
    now, mean, std = norm_statistics(20.0, 100.0), 20.0, 100.0
    generator = torch.Generator().manual_seed(2)
    for step in range(50):
        norm = torch.rand(2 + step % 7, generator=generator, dtype=torch.float64) * 40.0 + step
        mean, std = 0.99 * mean + 0.01 * statistics.mean(norm.tolist()), 0.99 * std + 0.01 * statistics.stdev(norm.tolist())
        now = next_norm_statistics(now, norm)
        assert float(now.mean) == pytest.approx(mean, rel=1e-13)
        assert float(now.std) == pytest.approx(std, rel=1e-13)


def test_norms_that_no_working_network_gives_count_as_the_nearest_that_one_does():
    moved = next_norm_statistics(norm_statistics(20.0, 5.0), torch.tensor([0.0, 1e30, 30.0], dtype=torch.float64))
    counted = [0.001, 100.0, 30.0]
    assert float(moved.mean) == pytest.approx(0.99 * 20.0 + 0.01 * statistics.mean(counted), rel=1e-14)
    assert float(moved.std) == pytest.approx(0.99 * 5.0 + 0.01 * statistics.stdev(counted), rel=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_a_norm_that_is_not_finite_leaves_the_statistics_alone(value, place):
    norm = torch.tensor([10.0, 12.0, 30.0], dtype=torch.float64)
    norm[place] = value
    before = norm_statistics(20.0, 5.0, torch.float32)  # float32, as the head keeps them
    assert next_norm_statistics(before, norm) == before


def test_a_single_sample_moves_the_mean_and_leaves_the_deviation():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a deviation of one value
        moved = next_norm_statistics(norm_statistics(20.0, 5.0), torch.tensor([10.0], dtype=torch.float64))
    assert float(moved.mean) == pytest.approx(19.9, rel=1e-14)
    assert float(moved.std) == 5.0


def test_statistics_keep_their_dtype_and_the_norms_stay_as_they_are():
    norm = torch.tensor([1e9, 12.0], dtype=torch.float64)
    moved = next_norm_statistics(NormStatistics.initial(torch.device("cpu")), norm)
    assert moved.mean.dtype == moved.std.dtype == torch.float32
    assert norm.tolist() == [1e9, 12.0]


# MagFace


def test_magfaces_margin_and_penalty_pass_gradcheck_in_the_norm():
    norm = torch.cat([INSIDE[1:-1:25], OUTSIDE[1:-1]]).requires_grad_()
    assert gradcheck(lambda a: magface_margin(a, *RANGE, MAG.l_m, MAG.u_m), norm)
    assert gradcheck(lambda a: magface_penalty(a, *RANGE), norm)


def test_magfaces_slopes_are_the_derivatives_in_the_norm():
    norm = torch.cat([INSIDE[1:-1:25], OUTSIDE[1:-1]]).requires_grad_()
    sample = MAG.of(norm.detach(), norm_statistics())
    assert torch.equal(sample.margin[1], magface_margin(norm.detach(), *RANGE, MAG.l_m, MAG.u_m))
    (m2_slope,) = torch.autograd.grad(magface_margin(norm, *RANGE, MAG.l_m, MAG.u_m).sum(), norm)
    (penalty_slope,) = torch.autograd.grad(MAG.lambda_g * magface_penalty(norm, *RANGE).sum(), norm)
    torch.testing.assert_close(sample.m2_slope, m2_slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(sample.penalty_slope, penalty_slope, rtol=1e-12, atol=1e-16)  # near u_a two terms of 3e-3 cancel


def test_magface_matches_the_formula_sample_by_sample():
    norm = torch.cat([INSIDE[::50], OUTSIDE])
    sample = MAG.of(norm, norm_statistics())
    for i, (margin, penalty) in enumerate(magface_reference(**vars(MAG))(n, norm) for n in norm):
        assert [float(m) for m in margin] == pytest.approx([1.0, float(sample.margin[1][i]), 0.0], abs=1e-14)
        assert float(penalty) == pytest.approx(float(sample.penalty[i]), rel=1e-14)


def test_the_norm_gets_magfaces_gradient_through_the_target_cosine():
    cosine = torch.tensor([0.9, 0.3, -0.2, -0.9], dtype=torch.float64)  # the last is past pi
    norm = torch.tensor([15.0, 60.0, 105.0, 40.0], dtype=torch.float64, requires_grad=True)

    def target(a):
        return unified_margin(cosine, (1.0, magface_margin(a, *RANGE, MAG.l_m, MAG.u_m), 0.0))

    assert gradcheck(target, norm)
    (derivative,) = torch.autograd.grad(target(norm).sum(), norm)
    sample = MAG.of(norm.detach(), norm_statistics())
    torch.testing.assert_close(margin_slope_in_m2(cosine, sample.margin) * sample.m2_slope, derivative, rtol=1e-9, atol=0)


def test_magfaces_margin_grows_from_l_m_to_u_m_and_stays_there():
    m2 = magface_margin(INSIDE, *RANGE, MAG.l_m, MAG.u_m)
    assert (m2.diff() > 0).all()
    assert m2[[0, -1]].tolist() == pytest.approx([MAG.l_m, MAG.u_m], rel=1e-15)
    beyond = magface_margin(OUTSIDE, *RANGE, MAG.l_m, MAG.u_m)
    assert beyond.tolist() == pytest.approx([MAG.l_m] * 4 + [MAG.u_m] * 3, rel=1e-15)


def test_magfaces_penalty_is_convex_and_falls_up_to_u_a_where_it_is_flat():
    penalty = magface_penalty(INSIDE, *RANGE)
    assert (penalty.diff() < 0).all()
    assert (penalty.diff().diff() > 0).all()
    at_the_end = MAG.of(torch.tensor([MAG.u_a], dtype=torch.float64), norm_statistics())
    assert float(at_the_end.penalty_slope) == pytest.approx(0.0, abs=1e-18)
    assert float(penalty[-1]) == pytest.approx(2.0 / MAG.u_a, rel=1e-15)


@pytest.mark.parametrize("norm", [MAG.l_a, 60.0, MAG.u_a])
def test_the_target_under_magface_falls_with_the_angle(norm):
    sample = MAG.of(torch.full_like(ANGLES, norm), norm_statistics())
    change = unified_margin(ANGLES.cos(), sample.margin).diff()
    assert (change < 0).all()
    assert change.abs().max() < 0.01, "no jump"


def slope_in_norm(magface, theta, norm, log_negatives):
    """d/d(norm) of log(1 + exp(log_negatives - s cos(theta + m))) + lambda_g g, all [n]."""
    sample = magface.of(norm, norm_statistics())
    pull = torch.sigmoid(log_negatives - SCALE * unified_margin(theta.cos(), sample.margin))
    return -SCALE * pull * margin_slope_in_m2(theta.cos(), sample.margin) * sample.m2_slope + sample.penalty_slope


def test_the_published_lambda_g_outweighs_the_margin_at_the_smallest_norm_and_22_would_not():
    least = SCALE * (MAG.u_m - MAG.l_m) / (MAG.u_a - MAG.l_a) / (MAG.l_a**-2 - MAG.u_a**-2)
    assert least == pytest.approx(22.5867, abs=1e-4)  # what the published training code prints for these values
    assert MAG.lambda_g > least
    smallest = torch.full_like(ANGLES, MAG.l_a)
    lost = torch.tensor(1e3, dtype=torch.float64)  # negatives so strong that the margin pulls with all its force
    for lambda_g, grows in ((MAG.lambda_g, True), (1.001 * least, True), (0.999 * least, False), (22.0, False)):
        slope = slope_in_norm(MagFace(lambda_g=lambda_g), ANGLES, smallest, lost)
        assert bool((slope < 0).all()) == grows, "a negative slope of the loss draws the norm up, away from l_a"


def test_every_angle_has_one_best_norm_and_it_grows_as_a_sample_nears_its_class_center():
    theta = torch.linspace(0.1, math.pi / 2 - MAG.u_m, 30, dtype=torch.float64)  # theta + m stays below pi / 2
    negatives = torch.tensor(35.0, dtype=torch.float64)
    over_norms = torch.stack([slope_in_norm(MAG, theta, torch.full_like(theta, float(a)), negatives) for a in INSIDE])
    assert (over_norms.diff(dim=0) > 0).all(), "the loss is strictly convex in the norm"
    assert (over_norms[0] < 0).all()
    assert (over_norms[-1] > 0).all()
    low, high = torch.full_like(theta, MAG.l_a), torch.full_like(theta, MAG.u_a)
    for _ in range(60):  # bisection: 100 / 2^60 is below a float64's own step
        middle = (low + high) / 2
        rising = slope_in_norm(MAG, theta, middle, negatives) > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    assert (low.diff() < 0).all()
    assert low[0] > 100.0, "near the class center almost u_a"
    assert low[-1] < 15.0, "far from it almost l_a"


def test_norms_beyond_both_ends_have_a_margin_and_a_penalty_and_no_slope():
    sample = MAG.of(OUTSIDE, norm_statistics())
    assert sample.margin[1].isfinite().all()
    assert sample.penalty.isfinite().all()
    assert (sample.m2_slope == 0).all()
    assert (sample.penalty_slope == 0).all()


@pytest.mark.parametrize("margin", [AdaFace(), MagFace()])
def test_a_norm_that_is_no_number_reaches_the_loss_so_that_the_step_is_skipped(margin):
    sample = margin.of(torch.tensor([math.nan, 20.0], dtype=torch.float64), norm_statistics())
    assert sample.margin[1].isnan().tolist() == [True, False]


@pytest.mark.parametrize("values", [{"m": 0.0}, {"m": 1.6}, {"m": math.nan}, {"h": 0.0}])
def test_adaface_refuses_values_outside_their_range(values):
    with pytest.raises(ValueError, match="AdaFace needs"):
        AdaFace(**values)


@pytest.mark.parametrize("values", [{"l_a": 0.0}, {"l_a": 110.0}, {"u_a": math.inf}, {"l_m": 0.8}, {"u_m": 3.2}, {"lambda_g": -1.0}])
def test_magface_refuses_values_outside_their_range(values):
    with pytest.raises(ValueError, match="MagFace needs"):
        MagFace(**values)
