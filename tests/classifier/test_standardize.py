from __future__ import annotations

import numpy as np
import pytest

from fedbio.classifier import Moments, Standardizer, moments
from fedbio.errors import DataError


def test_sums_of_parts_give_the_standardizer_of_the_whole() -> None:
    features = np.random.default_rng(0).normal(5, 3, (100, 4)).astype(np.float32)
    parts = Standardizer.from_moments([moments(features[:13]), moments(features[13:13]), moments(features[13:])])
    np.testing.assert_allclose(parts.mean, features.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(parts.scale, features.std(axis=0), rtol=1e-5)
    standardized = parts.apply(features)
    assert standardized.dtype == np.float32
    np.testing.assert_allclose(standardized.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(standardized.std(axis=0), 1, rtol=1e-5)


def test_moments_are_sums_in_float64() -> None:
    sums = moments(np.array([[1, 3], [2, -3]], dtype=np.float32))
    assert (sums.count, sums.total.tolist(), sums.squares.tolist()) == (2, [3.0, 0.0], [5.0, 18.0])
    assert sums.total.dtype == sums.squares.dtype == np.float64


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_constant_feature_is_centred_and_not_blown_up(value: float) -> None:
    features = np.full((1000, 1), value, dtype=np.float32)
    standardizer = Standardizer.fit(features)
    assert standardizer.scale.tolist() == [1.0]
    assert np.abs(standardizer.apply(features)).max() == 0.0


def test_one_protein_gives_a_standardizer() -> None:
    assert Standardizer.fit(np.array([[2.0, 3.0]], dtype=np.float32)).scale.tolist() == [1.0, 1.0]


def test_no_protein_is_refused() -> None:
    with pytest.raises(DataError, match="no protein to take mean and variance of"):
        Standardizer.from_moments([Moments(0, np.zeros(3), np.zeros(3))])
