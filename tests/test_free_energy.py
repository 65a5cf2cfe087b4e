from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from boltznce.analysis.convergence import time_blocks
from boltznce.analysis.free_energy import (
    choose_subset,
    corrected_free_energy_difference,
    ebm_bias,
    free_energy_difference,
    judged_by_exact,
    stratified_free_energy_difference,
    stratum_log_weights,
)
from boltznce.analysis.profiles import free_energy_profile
from boltznce.errors import UserError
from boltznce.states import in_interval

N_REPEATS = 200
STATE = (0.0, 2.0)


def consistent_with(coverage: int, n: int = N_REPEATS, confidence: float = 0.95) -> bool:
    """Whether ``coverage`` hits out of ``n`` are what a 95% interval would give, at the 0.1% level on either side."""
    return 0.001 < binom.cdf(coverage, n, confidence) and binom.sf(coverage - 1, n, confidence) > 0.001


def two_states(generator: np.random.Generator, n: int, share: float) -> np.ndarray:
    """Angles, a ``share`` of them around 1 rad (in the state), the others around -1.5."""
    return np.where(generator.random(n) < share, 1.0, -1.5) + 0.2 * generator.uniform(-1.0, 1.0, size=n)


def test_value_by_hand():
    result = free_energy_difference([1.0, -1.0, -1.0], np.log([1.0, 2.0, 3.0]), n_bootstrap=50)
    assert result.value == pytest.approx(np.log(5.0))
    assert (result.n_state, result.n_rest) == (1, 2)
    assert (result.ess_state, result.ess_rest) == (pytest.approx(1.0), pytest.approx(25 / 13))
    assert not result.reliable


def test_interval_covers_the_truth_with_importance_weights():
    """Drawn with a share 0.5, weighted to 0.2, with log-normal noise in the weights: the truth is log 4."""
    hits, errors, claimed = 0, [], []
    for seed in range(N_REPEATS):
        generator = np.random.default_rng(seed)
        angle = two_states(generator, 1000, 0.5)
        log_weights = np.log(np.where(in_interval(angle, STATE), 0.2, 0.8)) + 0.5 * generator.normal(size=1000)
        result = free_energy_difference(angle, log_weights, n_bootstrap=400, seed=seed)
        hits += result.interval[0] < np.log(4.0) < result.interval[1]
        errors.append(result.value - np.log(4.0))
        claimed.append(result.std_error)
    assert consistent_with(hits)
    assert np.mean(claimed) == pytest.approx(np.std(errors), rel=0.2)


def test_blocks_cover_the_truth_for_a_time_series_and_single_samples_do_not():
    hits = [0, 0]
    for seed in range(N_REPEATS):
        generator = np.random.default_rng(seed)
        state = np.repeat(generator.random(400) < 0.3, 10)  # each visit lasts ten frames
        angle = np.where(state, 1.0, -1.5)
        for k, walkers in enumerate((time_blocks(state), None)):
            found = free_energy_difference(angle, n_bootstrap=200, walkers=walkers, seed=seed)
            hits[k] += found.interval[0] < np.log(0.7 / 0.3) < found.interval[1]
            assert found.reliable
    assert consistent_with(hits[0])
    assert hits[1] < 0.7 * N_REPEATS


def test_walkers_are_the_units_of_the_error():
    """The jackknife over walkers is the same to first order; few walkers have a wide interval that is not reliable."""
    generator = np.random.default_rng(0)
    walker = np.repeat(generator.permutation(40), 50)
    angle = np.where(generator.random(2000) < np.repeat(generator.beta(3, 3, size=40), 50), 1.0, -1.5)
    log_weights = generator.normal(size=2000)
    found = free_energy_difference(angle, log_weights, walkers=walker)
    rest = [walker != k for k in range(40)]
    without = [free_energy_difference(angle[kept], log_weights[kept], n_bootstrap=2).value for kept in rest]
    assert found.reliable
    assert found.value == free_energy_difference(angle, log_weights, n_bootstrap=2).value
    assert found.std_error == pytest.approx(np.sqrt(39 / 40 * np.square(without - np.mean(without)).sum()), rel=0.05)
    few = free_energy_difference(angle, log_weights, walkers=walker // 8)
    assert "walkers" in few.message
    assert np.ptp(few.interval) > 2 * 2.7 * few.std_error  # of t with less than four degrees of freedom
    one = free_energy_difference(angle, log_weights, walkers=0 * walker)
    assert (one.interval, one.reliable) == (None, False)


def test_blocks_of_time_are_blocks_of_a_walker():
    generator = np.random.default_rng(0)
    walker = np.tile([7, 7, 3], 2000)
    blocks = time_blocks(generator.random(6000) < 0.5, walker)
    assert all(np.ptp(walker[blocks == k]) == 0 for k in np.unique(blocks))
    assert len(np.unique(blocks)) == pytest.approx(6000 / 6, rel=0.2)
    stuck = walker == 3  # each in one state all along
    np.testing.assert_array_equal(time_blocks(stuck, walker), stuck == 0)
    assert not free_energy_difference(np.where(stuck, 1.0, -1.0), walkers=time_blocks(stuck, walker)).reliable
    assert np.ptp(time_blocks(np.ones(100))) == 0


def test_a_side_never_seen_is_infinite_and_says_so():
    no_state = free_energy_difference(np.full(10, -1.0))
    assert no_state.value == np.inf
    assert no_state.interval is None
    assert np.isnan(no_state.std_error)
    assert "state" in no_state.message
    no_rest = free_energy_difference([1.0, -1.0], [0.0, -np.inf])
    assert no_rest.value == -np.inf
    assert "rest" in no_rest.message
    assert not no_rest.reliable


def test_bad_input_is_a_user_error():
    with pytest.raises(UserError, match="at least one"):
        free_energy_difference([])
    with pytest.raises(UserError, match="finite"):
        free_energy_difference([np.nan, 1.0])
    with pytest.raises(UserError, match="NaN"):
        free_energy_difference([-1.0, 1.0], [np.nan, 0.0])
    with pytest.raises(UserError, match="walkers"):
        free_energy_difference([-1.0, 1.0], walkers=3)


def ebm_with_an_error(generator: np.random.Generator, n: int, spread: float = 0.6) -> tuple[np.ndarray, ...]:
    """Angles of a flow (share 0.5), EBM log weights, EBM and exact log q, and the true dF.

    Exact weights make the share 0.25. The EBM's error has the mean 1 and the given spread in the state, 0 and half the
    spread in the rest, so that EBM weights are wrong by -1 - spread^2 / 2 + ..., and an added constant.
    """
    angle = two_states(generator, n, 0.5)
    inside = in_interval(angle, STATE)
    exact_log_weights = np.log(np.where(inside, 0.25, 0.75)) + 0.5 * generator.normal(size=n)
    exact_log_prob = generator.normal(size=n)
    error = np.where(inside, 1.0 + spread * generator.normal(size=n), 0.5 * spread * generator.normal(size=n)) + 17.0
    return angle, exact_log_weights - error, exact_log_prob + error, exact_log_prob, np.log(3.0)


def test_correction_recovers_the_exact_difference_and_its_total_interval_covers_it():
    hits, total, ebm_hits = 0, [], 0
    for seed in range(N_REPEATS):
        generator = np.random.default_rng(seed)
        angle, log_weights, ebm, exact, truth = ebm_with_an_error(generator, 1500)
        subset = choose_subset(angle, log_weights, 200, generator, drawn_by="weights")
        result = corrected_free_energy_difference(angle, log_weights, subset, ebm[subset], exact[subset])
        hits += result.interval[0] < truth < result.interval[1]
        total.append((result.value - truth, result.std_error))
        low, high = free_energy_difference(angle, log_weights, n_bootstrap=50, seed=seed).interval
        ebm_hits += low < truth < high
    errors, claimed = np.transpose(total)
    assert consistent_with(hits)
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(N_REPEATS) + 0.01
    assert np.mean(claimed) == pytest.approx(errors.std(), rel=0.2)
    assert ebm_hits < 0.1 * N_REPEATS


def test_a_subset_that_is_all_samples_has_the_exact_answer():
    generator = np.random.default_rng(0)
    angle, log_weights, ebm, exact, _ = ebm_with_an_error(generator, 2000)
    result = stratified_free_energy_difference(angle, log_weights + ebm - exact, np.arange(2000))
    direct = free_energy_difference(angle, log_weights + ebm - exact)
    assert result.value == pytest.approx(direct.value, abs=1e-10)
    assert result.std_error == pytest.approx(direct.std_error, rel=0.1)
    assert result.interval == pytest.approx(direct.interval, abs=0.03)
    assert result.ess_state == pytest.approx(direct.ess_state)
    assert result.reliable
    drawn = choose_subset(angle, log_weights, 2000, generator, drawn_by="weights")
    corrected = corrected_free_energy_difference(angle, log_weights, drawn, ebm[drawn], ebm[drawn])
    assert corrected.std_error == pytest.approx(free_energy_difference(angle, log_weights).std_error, rel=0.1)


def test_the_interval_of_a_stratified_subset_knows_its_strata():
    """Where all weights of a side are equal, a subset of 20 + 20 knows populations as well as all 20,000 samples do."""
    angle = two_states(np.random.default_rng(0), 20_000, 0.5)
    subset = choose_subset(angle, np.zeros(20_000), 40, np.random.default_rng(1))
    found = stratified_free_energy_difference(angle, np.zeros(40), subset)
    everything = free_energy_difference(angle)
    assert found.value == pytest.approx(everything.value)
    assert found.std_error == pytest.approx(everything.std_error, rel=0.1)
    one_side = stratified_free_energy_difference(angle, np.zeros(20), subset[:20])
    assert np.isnan(one_side.value)
    assert not one_side.reliable


@pytest.mark.parametrize(("bias", "known", "reliable"), [(0.0, 0.01, True), (0.2, 0.01, False), (0.0, 0.2, False)])
def test_the_row_of_an_ebm_is_reliable_only_where_its_error_is_within_the_interval(bias, known, reliable):
    angle = two_states(np.random.default_rng(0), 2000, 0.5)
    ebm = free_energy_difference(angle)
    assert ebm.reliable
    assert ebm.interval[1] - ebm.value == pytest.approx(0.09, abs=0.01)
    exact = replace(ebm, value=ebm.value - bias, std_error=known)
    assert ebm_bias(ebm, exact) == (pytest.approx(bias), known)
    assert judged_by_exact(ebm, exact).reliable == reliable
    assert not judged_by_exact(ebm, replace(exact, reliable=False)).reliable
    assert not judged_by_exact(ebm).reliable


def test_correction_says_when_it_is_not_reliable():
    generator = np.random.default_rng(0)
    angle, log_weights, ebm, exact, _ = ebm_with_an_error(generator, 3000, spread=4.0)
    subset = choose_subset(angle, log_weights, 300, generator, drawn_by="weights")
    wide = corrected_free_energy_difference(angle, log_weights, subset, ebm[subset], exact[subset])
    assert not wide.reliable
    assert "effective samples" in wide.message or "Pareto" in wide.message
    few = choose_subset(angle, log_weights, 4, generator, drawn_by="weights")
    assert not corrected_free_energy_difference(angle, log_weights, few, ebm[few], exact[few]).reliable
    inside_only = subset[in_interval(angle, STATE)[subset]]
    one_sided = corrected_free_energy_difference(angle, log_weights, inside_only, ebm[inside_only], exact[inside_only])
    assert np.isnan(one_sided.value)
    assert one_sided.interval is None
    angle, log_weights, ebm, exact, _ = ebm_with_an_error(generator, 3000, spread=0.2)
    subset = choose_subset(angle, log_weights, 400, generator, drawn_by="weights")
    assert corrected_free_energy_difference(angle, log_weights, subset, ebm[subset], exact[subset]).reliable
    with pytest.raises(UserError, match="finite"):
        corrected_free_energy_difference(angle, log_weights, subset, ebm[subset], np.full(len(subset), np.nan))


def test_a_subset_is_spread_over_the_states():
    generator = np.random.default_rng(0)
    angle = two_states(generator, 5000, 0.1)
    log_weights = generator.normal(size=5000)
    uniform = choose_subset(angle, log_weights, 200, generator)
    assert len(np.unique(uniform)) == 200
    assert in_interval(angle, STATE)[uniform].sum() == 100
    weighted = choose_subset(angle, log_weights, 200, generator, drawn_by="weights")
    assert in_interval(angle, STATE)[weighted].sum() == 100
    assert log_weights[weighted].mean() > log_weights[uniform].mean() + 0.5
    with pytest.raises(UserError, match="uniform or weights"):
        choose_subset(angle, log_weights, 200, generator, drawn_by="hope")


def test_exact_weights_of_a_subset_keep_the_populations_of_the_flow():
    generator = np.random.default_rng(0)
    angle = two_states(generator, 20_000, 0.1)
    subset = choose_subset(angle, np.zeros(20_000), 2000, generator)
    bare = free_energy_difference(angle[subset], n_bootstrap=20)
    restored = free_energy_difference(angle[subset], stratum_log_weights(angle, subset), n_bootstrap=20)
    assert bare.value == pytest.approx(0.0)
    assert restored.value == pytest.approx(free_energy_difference(angle, n_bootstrap=20).value)


@pytest.mark.parametrize("kappa", [None, 400.0])
def test_profile_of_a_von_mises_density(kappa):
    """-log p = -2 cos(angle) + constant, found from uniform angles with weights."""
    angle = np.random.default_rng(0).uniform(-np.pi, np.pi, size=200_000)
    profile = free_energy_profile(angle, 2.0 * np.cos(angle), n_bins=60, kappa=kappa, n_bootstrap=50)
    expected = 2.0 - 2.0 * np.cos(profile.centres)
    assert profile.free_energy.min() == 0.0
    np.testing.assert_allclose(profile.free_energy, expected, atol=0.1)
    error = profile.free_energy - expected
    assert np.mean(np.abs(error - error.mean()) < 2.0 * profile.std_error + 0.01) > 0.85


@pytest.mark.parametrize("kappa", [None, 400.0])
def test_profile_has_gaps_where_nothing_was_seen(kappa):
    angle = np.random.default_rng(0).uniform(-1.0, 1.0, size=5000)
    profile = free_energy_profile(angle, n_bins=60, kappa=kappa, n_bootstrap=20, walkers=np.arange(5000) // 250)
    far = np.abs(profile.centres) > 1.2
    assert np.isnan(profile.free_energy[far]).all()
    assert np.isnan(profile.std_error[far]).all()
    near = np.abs(profile.centres) < 0.9
    assert (profile.free_energy[near] < 0.5).all()
    assert (profile.std_error[near] > 0.0).all()


def test_profile_between_limits_is_a_histogram():
    x = np.random.default_rng(0).normal(size=50_000)
    log_weights = 0.5 * x  # of a normal distribution around 0.5
    profile = free_energy_profile(x, log_weights, n_bins=40, n_bootstrap=50, limits=(-2.0, 3.0))
    assert profile.centres[0] == pytest.approx(-2.0 + 5.0 / 80)
    expected = (profile.centres - 0.5) ** 2 / 2
    assert np.abs(profile.free_energy - expected).max() < 0.1
    outside = free_energy_profile(
        np.append(x, 100.0), np.append(log_weights, 0.0), n_bins=40, n_bootstrap=50, limits=(-2.0, 3.0)
    )
    np.testing.assert_allclose(outside.free_energy, profile.free_energy)
    with pytest.raises(UserError, match="kappa"):
        free_energy_profile(x, None, limits=(-2.0, 3.0), kappa=10.0)


def test_repeated_draws_of_an_ebm_without_error_are_reliable():
    generator = np.random.default_rng(0)
    angle, log_weights = generator.uniform(-np.pi, np.pi, size=5000), generator.normal(scale=0.7, size=5000)
    subset = choose_subset(angle, log_weights, 1000, generator, drawn_by="weights")
    exact = generator.normal(size=len(np.unique(subset)))
    ebm = exact + generator.normal(scale=0.05, size=len(exact))
    place = np.searchsorted(np.unique(subset), subset)
    found = corrected_free_energy_difference(angle, log_weights, subset, ebm[place], exact[place])
    assert found.reliable, found.message


def test_a_heavy_tail_that_carries_nothing_is_no_reason_to_doubt():
    generator = np.random.default_rng(1)
    angle = generator.uniform(-np.pi, np.pi, size=4000)
    heavy = generator.random(4000) ** -0.9
    doubtful, fine = (free_energy_difference(angle, np.log1p(scale * heavy), n_bootstrap=100) for scale in (1.0, 1e-5))
    assert doubtful.pareto_k_rest > 0.7 < fine.pareto_k_rest
    assert (doubtful.reliable, fine.reliable) == (False, True)
    assert fine.tail_rest < fine.std_error < doubtful.tail_rest
