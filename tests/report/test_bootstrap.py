"""Intervals agree with what theory gives where theory is exact enough."""

from __future__ import annotations

import numpy as np
import pytest

from fedbio.report.bootstrap import Estimate, resampled_sums


def column(*counts: int) -> np.ndarray:
    """Ones and zeros in turn: `column(2, 3)` is 1 1 0 0 0."""
    values = [index % 2 == 0 for index, count in enumerate(counts) for _ in range(count)]
    return np.array(values, np.float32)[:, None]


def test_interval_of_a_share_is_that_of_the_binomial_distribution() -> None:
    estimate = Estimate.of(resampled_sums(column(280, 120))[:, 0] / 400)
    assert estimate.value == 0.7
    # scipy.stats.binom.ppf([0.025, 0.975], 400, 0.7) / 400; the ends of 2,000 resamples stray by about one protein
    assert estimate.low == pytest.approx(0.655, abs=0.006)
    assert estimate.high == pytest.approx(0.745, abs=0.006)
    assert (estimate.not_above_zero, estimate.resamples) == (0, 2000)


def test_interval_of_a_gain_is_paired() -> None:
    # of 200 proteins 30 are right only with the second model, 10 only with the first, 100 with both
    first = np.concatenate([column(0, 30), column(10), column(100), column(0, 60)])
    second = np.concatenate([column(30), column(0, 10), column(100), column(0, 60)])
    sums = resampled_sums(np.hstack([first, second]))
    gain = Estimate.of((sums[:, 1] - sums[:, 0]) / 200)
    assert gain.value == pytest.approx(0.10)
    # standard error sqrt((40/200 - 0.1**2) / 200) = 0.0308; unpaired it would be 0.048
    assert gain.low == pytest.approx(0.10 - 1.96 * 0.0308, abs=0.008)
    assert gain.high == pytest.approx(0.10 + 1.96 * 0.0308, abs=0.008)


def test_resamples_without_a_gain_are_counted() -> None:
    estimate = Estimate.of(np.array([0.1, 0.2, 0.0, -0.1, 0.3]))
    assert (estimate.not_above_zero, estimate.resamples) == (2, 4)


def test_resamples_in_which_the_number_is_undefined_are_left_out() -> None:
    estimate = Estimate.of(np.array([0.5, np.nan, 0.5, 0.5]))
    assert (estimate.low, estimate.high, estimate.resamples) == (0.5, 0.5, 2)


def test_draws_do_not_depend_on_the_other_columns() -> None:
    alone = resampled_sums(column(30, 20))
    beside = resampled_sums(np.hstack([column(10, 40), column(30, 20)]))
    np.testing.assert_array_equal(alone[:, 0], beside[:, 1])


def test_every_resample_draws_as_many_proteins_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbio.report.bootstrap._DRAWS_AT_ONCE", 128)
    sums = resampled_sums(np.ones((50, 1), np.float32), resamples=7)
    assert sums[:, 0].tolist() == [50.0] * 8
