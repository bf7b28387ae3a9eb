"""Distances against theory, against the field's libraries, and their intervals against simulation."""

import numpy as np
import pytest

from raresynth.quality.distances import Estimates, frechet_distance, kernel_distance, kernel_distances
from raresynth.quality.neighbours import neighbourhood


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_frechet_distance_of_a_shift_is_its_square(rng):
    x = rng.normal(size=(300, 16))
    shift = rng.normal(size=16)
    assert frechet_distance(x, x + shift) == pytest.approx(shift @ shift, rel=1e-9)


@pytest.mark.parametrize("n", [20, 300])
def test_frechet_distance_of_a_scaling_is_known(rng, n):
    """S2 = a^2 S1, so FD = (1 - a)^2 (|mu|^2 + tr S1), also where the covariance is singular (20 images)."""
    x = rng.normal(size=(n, 64)) * rng.uniform(0.1, 2, 64) + 1
    expected = (1 - 1.7) ** 2 * (np.square(x.mean(0)).sum() + x.var(0, ddof=1).sum())
    assert frechet_distance(x, 1.7 * x) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_equals_pytorch_fid(rng):
    from pytorch_fid.fid_score import calculate_frechet_distance

    x, y = rng.normal(size=(200, 12)), rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12)) + 0.3
    theirs = calculate_frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_of_equal_distributions_falls_with_the_number_of_images(rng):
    """The bias for N(0, I/d) is 1/n + 1/m + 2 - 2 E sqrt(eigenvalue), the eigenvalues being Marchenko and Pastur's."""
    d, m = 64, 20_000

    def expected(n):
        edge = np.sqrt(d / n)
        eigenvalues = np.linspace((1 - edge) ** 2, (1 + edge) ** 2, 100_001)
        density = np.sqrt((eigenvalues[-1] - eigenvalues) * (eigenvalues - eigenvalues[0])) / eigenvalues
        return 1 / n + 1 / m + 2 - 2 * (np.sqrt(eigenvalues) * density).sum() / density.sum()

    large = rng.normal(size=(m, d)) / np.sqrt(d)
    for n in (115, 1113):
        found = np.mean([frechet_distance(rng.normal(size=(n, d)) / np.sqrt(d), large) for _ in range(5)])
        assert found == pytest.approx(expected(n), rel=0.1)


def test_kernel_distance_equals_torch_fidelity(rng):
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = rng.normal(size=(80, 10)), rng.normal(size=(80, 10)) + 0.2
    options = {"kid_subsets": 1, "kid_subset_size": 80, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
    options |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1.0, "rng_seed": 0, "verbose": False}
    theirs = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **options)
    assert kernel_distance(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_kernel_distance_of_equal_distributions_is_0_on_average(rng):
    values = [kernel_distance(rng.normal(size=(20, 8)), rng.normal(size=(30, 8))) for _ in range(400)]
    assert min(values) < 0
    assert abs(np.mean(values)) < 3 * np.std(values) / 20


def _truth(shift, d):
    """KID between N(0, I) and N(shift, I): E(x.y/d + 1)^3 is 1 + 3 s + 3 (tr + s^2 ...) by moments of x.y."""
    square = float(np.square(np.full(d, shift)).sum())

    def expectation(mean_product, second):
        # x.y/d for independent x ~ N(a, I), y ~ N(b, I): mean a.b/d; second and third moments below.
        return 1 + 3 * mean_product + 3 * second[0] + second[1]

    def moments(a2, b2, ab):
        # t = x.y: E t = ab, E t^2 = d + a2 + b2 + ab^2, E t^3 = ab (3 d + 6 + 3 a2 + 3 b2 + ab^2).
        return (d + a2 + b2 + ab**2) / d**2, ab * (3 * d + 6 + 3 * a2 + 3 * b2 + ab**2) / d**3

    same_x = expectation(0.0, moments(0, 0, 0))
    same_y = expectation(square / d, moments(square, square, square))
    cross = expectation(0.0, moments(0, square, 0))
    return same_x + same_y - 2 * cross


def test_kernel_intervals_hold_the_truth_as_often_as_they_say(rng):
    d, inside, ratio_inside, difference_inside, trials = 16, 0, 0, 0, 300
    near, far = _truth(0.35, d), _truth(1.0, d)
    for _ in range(trials):
        x, y, z = (
            rng.normal(size=(60, d)),
            rng.normal(size=(100, d)) + 0.35,
            rng.normal(size=(80, d)) + 1.0,
        )
        estimates = kernel_distances(x, y, z)
        assert estimates.first == pytest.approx(kernel_distance(x, y), rel=1e-9, abs=1e-12)
        assert estimates.second == pytest.approx(kernel_distance(x, z), rel=1e-9)
        low, high = estimates.interval()
        inside += low <= near <= high
        ratio_low, ratio_high = estimates.ratio_interval()
        ratio_inside += ratio_low <= near / far <= ratio_high
        difference, error = estimates.difference()
        difference_inside += abs(difference - (far - near)) <= 1.959964 * error
    assert 0.90 <= inside / trials <= 0.99
    assert 0.90 <= ratio_inside / trials <= 0.99
    assert 0.90 <= difference_inside / trials <= 0.99


def test_images_of_one_group_do_not_count_as_independent(rng):
    x, y, z = rng.normal(size=(40, 8)), rng.normal(size=(900, 8)) + 0.5, rng.normal(size=(900, 8)) + 1
    twice, groups = np.concatenate([x, x]), np.tile(np.arange(40), 2)
    careless = kernel_distances(twice, y, z).covariance[1, 1]
    careful = kernel_distances(twice, y, z, groups).covariance[1, 1]
    assert careful > 1.3 * careless


def test_ratio_interval_with_an_exact_denominator_is_the_plain_one():
    estimates = Estimates(1.0, 4.0, np.array([[0.04, 0.0], [0.0, 0.0]]))
    half = 1.959964 * 0.2 / 4
    assert estimates.ratio_interval() == pytest.approx((0.25 - half, 0.25 + half))


def test_no_ratio_to_a_denominator_that_may_be_0():
    estimates = Estimates(1.0, 0.5, np.array([[0.04, 0.0], [0.0, 0.09]]))
    assert estimates.ratio() is None
    assert estimates.ratio_interval() is None
    assert Estimates(1.0, -5.0, np.eye(2) * 0.01).ratio_interval() is None


def test_neighbourhood_by_hand():
    """Four reals on a line, k = 3, so each real's ball reaches the farthest of the others."""
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    fake = np.array([[0.5], [1.5], [100.0], [-100.0]])
    # Radii are 3, 2, 2, 3: both near fakes lie in all four balls, the far ones in none.
    found = neighbourhood(real, fake)
    assert (found.precision, found.density, found.coverage) == (0.5, pytest.approx(8 / 12), 1.0)
    # Balls of the near fakes reach 100.5 and 101.5 away, so every real is reached.
    assert found.recall == 1.0


def test_coverage_of_equal_distributions_is_what_naeem_et_al_derive(rng):
    """1 - product over i < k of (n - 1 - i) / (2 n - 1 - i), for any distribution (their equation 8)."""
    n, k = 100, 3
    expected = 1 - np.prod([(n - i) / (2 * n - i) for i in range(1, k + 1)])
    found = np.mean([neighbourhood(rng.normal(size=(n, 5)), rng.normal(size=(n, 5))).coverage for _ in range(30)])
    assert found == pytest.approx(expected, abs=0.02)


def test_neighbourhood_refuses_unequal_numbers(rng):
    with pytest.raises(ValueError, match="as many fakes as reals"):
        neighbourhood(rng.normal(size=(10, 2)), rng.normal(size=(11, 2)))


def test_pairs_of_one_group_do_not_bias_kid(rng):
    """Perfect fakes of lesions that were photographed twice: 0 on average, where counting all pairs gives more."""

    def lesions(n, views):
        return np.repeat(rng.normal(size=(n, 16)), views, 0) + 0.3 * rng.normal(size=(n * views, 16))

    groups = np.repeat(np.arange(20), 2)
    careful, careless = [], []
    for _ in range(200):
        real, fake = lesions(20, 2), lesions(60, 1)
        careful.append(kernel_distance(real, fake, groups))
        careless.append(kernel_distance(real, fake))
        estimates = kernel_distances(real, fake, real + 1.0, groups, None, groups)
        assert estimates.first == pytest.approx(careful[-1], rel=1e-9, abs=1e-12)
    assert abs(np.mean(careful)) < 3 * np.std(careful) / np.sqrt(200)
    assert np.mean(careless) > 5 * np.std(careless) / np.sqrt(200)


@pytest.mark.parametrize("place", [0, 1])
def test_groups_of_a_compared_set_widen_its_error(rng, place):
    x, y, z = rng.normal(size=(900, 8)), rng.normal(size=(900, 8)), np.repeat(rng.normal(size=(30, 8)) + 0.5, 3, 0)
    groups = np.repeat(np.arange(30), 3)
    sets, numbers = ((y, z), (None, groups)) if place else ((z, y), (groups, None))
    careless = kernel_distances(x, *sets).covariance
    careful = kernel_distances(x, *sets, None, *numbers).covariance
    assert careful[place, place] > 2 * careless[place, place]
    assert careful[1 - place, 1 - place] == pytest.approx(careless[1 - place, 1 - place])
