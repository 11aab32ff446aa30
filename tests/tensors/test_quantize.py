from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbio.errors import FormatError
from fedbio.tensors.quantize import BOOKS, INT8_TABLE, SCHEMES, decode, encode, encoded_bytes

Array = np.ndarray[Any, Any]

DISTRIBUTIONS = ["normal", "uniform", "student t, 3", "student t, 2", "laplace", "outliers", "upper half"]


def draw(distribution: str, count: int, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    values = {
        "normal": lambda: random.standard_normal(count),
        "uniform": lambda: random.uniform(-1, 1, count),
        "student t, 3": lambda: random.standard_t(3, count),
        "student t, 2": lambda: random.standard_t(2, count),
        "laplace": lambda: random.laplace(size=count),
        "outliers": lambda: random.standard_normal(count) * np.where(np.arange(count) % 4096, 1, 100),
        "upper half": lambda: random.uniform(0.5, 1, count) * random.choice([-1, 1], count),
    }[distribution]()
    return values.astype(np.float32)


def floats(bits: Any) -> Array:
    return np.asarray(bits, np.uint32).view(np.float32)


def there_and_back(scheme: str, values: Array) -> Array:
    return decode(scheme, encode(scheme, values).data, values.size)


def relative_error(decoded: Array, values: Array) -> float:
    return float(np.linalg.norm(decoded.astype(np.float64) - values) / np.linalg.norm(values.astype(np.float64)))


def nearest(values: Array, book: Array, block: int) -> Array:
    """Return what the definition decodes to: the book's value nearest to each value's share of its block's largest."""
    out = np.empty(values.size)
    for start in range(0, values.size, block):
        rows = values[start : start + block].astype(np.float64)
        largest = np.abs(rows).max() or 1.0
        distance = np.abs(rows[:, None] / largest - np.unique(book).astype(np.float64))
        out[start : start + block] = np.unique(book)[distance.argmin(axis=1)] * largest
    return out


def dynamic_map() -> Array:
    """Return the 256 shares that bitsandbytes' 8-bit codes stand for (Dettmers 2016, arXiv:1511.04561)."""
    shares = [0.0, 1.0]
    for decade in range(7):
        bounds = np.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * (bounds[1:] + bounds[:-1]) / 2
        shares += [*middles, *-middles]
    return np.array(shares)


def test_codes_have_the_documented_bytes() -> None:
    values = np.array([1, -0.5, 0.25, 0], np.float32)
    assert encode("float16", values).tobytes() == bytes.fromhex("003c 00b8 0034 0000")
    assert encode("bfloat16", values).tobytes() == bytes.fromhex("803f 00bf 803e 0000")
    assert encode("nf4", values).tobytes() == bytes.fromhex("0000803f f2 a7")
    assert encode("fp4", values).tobytes() == bytes.fromhex("0000803f 3d 70")
    # even steps of 1/127: the scale's two low bits are 0
    assert encode("int8", values).tobytes() == bytes.fromhex("0000803f 7f c0 20 00")


def test_second_and_third_book_of_int8_have_the_documented_bytes() -> None:
    values = np.array([252, 128, -127, 64, -1], np.float32).repeat([1, 1, 1, 1, 20])
    codes = encode("int8", values).tobytes()
    assert codes[:9] == bytes.fromhex("01007c43 7f 60 e0 40 81")  # 252 with book 1; 127 is as near to 126 as to 128
    values = np.array([1984, -992, 31, 33, -1], np.float32).repeat([1, 1, 1, 1, 200])
    assert encode("int8", values).tobytes()[:9] == bytes.fromhex("0200f844 7f ef 1f 20 81")


@pytest.mark.parametrize(
    ("scheme", "count", "expected"),
    [
        ("float16", 1001, 2002),
        ("bfloat16", 1001, 2002),
        ("int8", 4096, 4100),
        ("int8", 4097, 4105),
        ("fp4", 64, 36),
        ("nf4", 65, 41),
        ("nf4", 0, 0),
    ],
)
def test_encoded_bytes_count_codes_and_scales(scheme: str, count: int, expected: int) -> None:
    assert encoded_bytes(scheme, count) == expected


def test_float16_has_numpys_bits_on_every_half_its_neighbours_and_the_ties_between() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:].astype(np.float64) + halves[:-1]) / 2
    exact = np.concatenate([halves, ties.astype(np.float32)])
    positive = np.concatenate([exact, np.nextafter(exact, np.float32(-1)), np.nextafter(exact, np.float32(1e9))])
    values = np.concatenate([positive, -positive])
    np.testing.assert_array_equal(encode("float16", values).view(np.uint16), values.astype(np.float16).view(np.uint16))


def test_float16_decodes_every_finite_half() -> None:
    halves = np.concatenate([np.arange(0x7C00), np.arange(0x8000, 0xFC00)]).astype(np.uint16)
    decoded = decode("float16", halves.tobytes(), halves.size)
    np.testing.assert_array_equal(decoded.view(np.uint32), halves.view(np.float16).astype(np.float32).view(np.uint32))


def test_bfloat16_rounds_to_nearest_and_ties_to_even() -> None:
    low = [0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0xBF808001, 0x00000001, 0x7F7F7FFF, 0x80000000]
    high = [0x3F80, 0x3F80, 0x3F80, 0x3F81, 0x3F82, 0xBF81, 0x0000, 0x7F7F, 0x8000]
    encoded = encode("bfloat16", floats(low))
    np.testing.assert_array_equal(encoded.view(np.uint16), high)
    np.testing.assert_array_equal(decode("bfloat16", encoded.data, len(low)), floats(np.array(high) << 16))


@pytest.mark.parametrize("scheme", ["fp4", "nf4"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_4_bit_code_is_the_nearest_of_its_book(scheme: str, distribution: str) -> None:
    values = draw(distribution, 20_001)
    optimum = np.abs(nearest(values, BOOKS[scheme], 64) - values)
    error = np.abs(there_and_back(scheme, values).astype(np.float64) - values)
    # a share is rounded to float32 before it is compared, and a value once more when it is decoded
    assert (error <= optimum + 2.0**-22 * np.abs(values).max()).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_int8_code_is_the_nearest_of_its_blocks_book(distribution: str) -> None:
    values = draw(distribution, 9000)
    encoded = encode("int8", values)
    books = encoded[:12].view(np.uint32) & 3
    decoded = decode("int8", encoded.data, values.size).astype(np.float64)
    for block, book in enumerate(books):
        rows = values[4096 * block : 4096 * (block + 1)]
        optimum = np.abs(nearest(rows, INT8_TABLE.reshape(3, 256)[book], 4096) - rows)
        error = np.abs(decoded[4096 * block : 4096 * (block + 1)] - rows)
        assert (error <= optimum + 2.0**-20 * np.abs(rows).max()).all()


@pytest.mark.parametrize(
    ("distribution", "bound"),
    [("normal", 0.0072), ("uniform", 0.0040), ("student t, 3", 0.0128), ("laplace", 0.0090)],
)
def test_int8_loses_less_than_the_dynamic_map(distribution: str, bound: float) -> None:
    values = draw(distribution, 1 << 16)
    error = relative_error(there_and_back("int8", values), values)
    assert error < bound < relative_error(nearest(values, dynamic_map(), 4096), values)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_distribution_fares_worse_than_with_the_dynamic_map(distribution: str) -> None:
    values = draw(distribution, 1 << 15)
    error = relative_error(there_and_back("int8", values), values)
    assert error < relative_error(nearest(values, dynamic_map(), 4096), values)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(data=st.data())
def test_errors_stay_within_half_a_step_whatever_the_values(scheme: str, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200))
    values = floats(np.array(bits, np.uint32))
    values = values[np.isfinite(values)]
    if scheme == "float16":
        values = values[np.abs(values) < 65520]
    if scheme == "bfloat16":
        values = values[np.abs(values) < 3.389e38]
    if not values.size:
        return
    decoded = there_and_back(scheme, values).astype(np.float64)
    assert np.isfinite(decoded).all()
    magnitudes = np.abs(values.astype(np.float64))
    if SCHEMES[scheme].block:
        block = SCHEMES[scheme].block
        largest = np.array([magnitudes[i // block * block :][:block].max() for i in range(values.size)])
        # half of the widest gap of each book; a scale below 4 of the smallest floats is cut to zero by int8's two bits
        half_step = {"int8": 64 / 1984 / 2, "nf4": 0.152, "fp4": 0.167}[scheme] * largest + 3 * 2.0**-149
    else:
        half_step = magnitudes * (2.0**-11 if scheme == "float16" else 2.0**-8)
        half_step += 2.0**-25 if scheme == "float16" else 2.0**-133
    assert (np.abs(decoded - values) <= half_step * (1 + 1e-6)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("count", [1, 63, 64, 65, 4095, 4096, 4097, 100_001])
def test_any_number_of_values_comes_back(scheme: str, count: int) -> None:
    values = draw("normal", count)
    encoded = encode(scheme, values)
    assert encoded.nbytes == encoded_bytes(scheme, count)
    decoded = decode(scheme, encoded.data, count)
    assert decoded.shape == (count,)
    assert decoded.dtype == np.float32
    assert relative_error(decoded, values) < {"float16": 3e-4, "bfloat16": 3e-3, "int8": 0.01}.get(scheme, 0.14)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_come_back_as_zeros_beside_blocks_that_are_not(scheme: str) -> None:
    values = draw("normal", 3 * 4096)
    values[4096:8192] = 0
    assert not there_and_back(scheme, values)[4096:8192].any()
    assert not there_and_back(scheme, np.zeros(100, np.float32)).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_block_extremes_come_back(scheme: str) -> None:
    values = np.array([-3.0, 0.0, 3.0], np.float32)
    np.testing.assert_allclose(there_and_back(scheme, values), values, rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf, -np.nan])
def test_value_that_is_not_finite_is_refused_wherever_it_is(scheme: str, fault: float) -> None:
    for place in (0, 5000, 9999):
        values = draw("normal", 10_000)
        values[place] = fault
        with pytest.raises(FormatError, match="some values are not finite, so they cannot be quantized"):
            encode(scheme, values)


def test_value_too_large_is_refused_with_a_remedy() -> None:
    assert there_and_back("float16", np.array([65519.0], np.float32)) == 65504
    with pytest.raises(FormatError, match="the value 65520 is too large for float16; use bfloat16"):
        encode("float16", np.array([1, -65520], np.float32))
    with pytest.raises(FormatError, match=r"the value 3.40282e\+38 is too large for bfloat16; leave it as it is"):
        encode("bfloat16", np.array([np.finfo(np.float32).max]))
    with pytest.raises(FormatError, match="not finite"):
        encode("nf4", np.array([1e300]))


@pytest.mark.parametrize("scheme", ["int8", "fp4", "nf4"])
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan, -1.0])
def test_hostile_scale_is_refused(scheme: str, scale: float) -> None:
    encoded = encode(scheme, draw("normal", 10_000))
    encoded[4:8].view(np.float32)[:] = scale
    with pytest.raises(FormatError, match="the scale of a block is not a finite number >= 0"):
        decode(scheme, encoded.data, 10_000)


@pytest.mark.parametrize(("scheme", "half"), [("float16", 0x7C00), ("float16", 0xFE00), ("bfloat16", 0xFF80)])
def test_hostile_half_is_refused(scheme: str, half: int) -> None:
    with pytest.raises(FormatError, match="some quantized values are not finite"):
        decode(scheme, np.array([0, half], np.uint16).tobytes(), 2)


def test_book_that_int8_does_not_have_is_refused() -> None:
    encoded = encode("int8", draw("normal", 100))
    encoded[0] |= 3
    with pytest.raises(FormatError, match="a block names a book that int8 does not have"):
        decode("int8", encoded.data, 100)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_that_lie_unaligned_are_decoded(scheme: str) -> None:
    values = draw("normal", 5001)
    encoded = encode(scheme, values).tobytes()
    np.testing.assert_array_equal(decode(scheme, memoryview(b"x" + encoded)[1:], 5001), decode(scheme, encoded, 5001))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_input_is_left_as_it_was(scheme: str) -> None:
    values = draw("normal", 1000)
    before = values.copy()
    encode(scheme, values)
    np.testing.assert_array_equal(values, before)


def test_threads_do_not_share_their_scratch() -> None:
    inputs = [draw("normal", 1 << 16, seed) for seed in range(4)]
    expected = [[encode(scheme, values).tobytes() for scheme in SCHEMES] for values in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        results = [[encode(scheme, inputs[number]).tobytes() for scheme in SCHEMES] for _ in range(10)]
        wrong.append(sum(result != expected[number] for result in results))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0, 0, 0]
