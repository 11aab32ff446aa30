"""Quantize float32 values segment by segment, in numpy: float16, bfloat16, and int8, fp4, nf4 in blocks.

Each code stands for the nearest value that its scheme can tell. All schemes work on whole arrays: a pass of numpy over
a segment takes 30 microseconds, and none of them needs more than forty.

``float16``, ``bfloat16``
    The IEEE format, and float32's upper half; ties go to the even code.
``int8``
    Sign and magnitude 0 to 127 as a share of the block's largest magnitude. A block uses the one of three books that
    suits it: even steps, or steps that double with each octave after the first 64 or 32 codes.
``fp4``, ``nf4``
    The sixteen values of bitsandbytes, as a share of the block's largest magnitude; two codes a byte, high half first.
"""

from __future__ import annotations

__all__ = ["SCHEMES", "SEGMENT_VALUES", "decode", "encode", "encoded_bytes"]

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedbio.errors import FormatError

SEGMENT_VALUES = 1 << 18
"""Values that are encoded together: 1 MiB of float32, which stays in a core's second-level cache."""

Array = np.ndarray[Any, Any]

_U32 = np.uint32


class _Scratch(threading.local):
    """Arrays that a thread keeps for its next segment: in fresh ones, page faults take longer than the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def take(self, purpose: str, count: int, dtype: type[np.generic]) -> Array:
        """Return an array with whatever was in it; the next call for the same purpose returns it again."""
        nbytes = count * np.dtype(dtype).itemsize
        if purpose not in self._kept or self._kept[purpose].nbytes < nbytes:
            self._kept[purpose] = np.empty(nbytes, np.uint8)
        return self._kept[purpose][:nbytes].view(dtype)


_scratch = _Scratch()


def encoded_bytes(scheme: str, count: int) -> int:
    """Return the bytes that `count` values take, their scales included."""
    kind = SCHEMES[scheme]
    return 4 * _blocks(count, kind.block) + -(-count * kind.bits // 8)


def encode(scheme: str, values: Array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return one segment's bytes in fresh memory: the scales of its blocks (float32), then the codes.

    Parameters
    ----------
    scheme : str
        One of `SCHEMES`.
    values : ndarray, shape (n,)
        Floats of any width; n > 0.

    Raises
    ------
    FormatError
        If a value is not finite, or too large for the scheme.
    """
    kind = SCHEMES[scheme]
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused as such
        plain = np.ascontiguousarray(values, np.float32)
    encoded = np.empty(encoded_bytes(scheme, plain.size), np.uint8)
    scale_bytes = 4 * _blocks(plain.size, kind.block)
    kind.encode(plain, encoded[:scale_bytes].view(np.float32), encoded[scale_bytes:])
    return encoded


def decode(scheme: str, encoded: bytes | bytearray | memoryview, count: int) -> Array:
    """Return the `count` values of one segment, float32 and finite, in fresh memory.

    Raises
    ------
    FormatError
        If a scale or a value is not finite.
    """
    kind = SCHEMES[scheme]
    scale_bytes = 4 * _blocks(count, kind.block)
    raw = np.frombuffer(encoded, np.uint8)
    return kind.decode(raw[:scale_bytes].view(np.float32), raw[scale_bytes:], count)


def _blocks(count: int, block: int) -> int:
    return -(-count // block) if block else 0


# --- rounding to a float format ---


def _round_to_float(magnitudes: Array, fraction_bits: Any, lowest: Any) -> Array:
    """Return the codes (exponent and fraction, uint32) of float32 magnitudes in a narrower float format.

    numpy's own float16 conversion takes 26 times as long when results are subnormal, as those of small updates are.

    Parameters
    ----------
    magnitudes : ndarray of float32
        All >= 0; overwritten.
    fraction_bits : int or column of uint32
    lowest : float32 or column of float32
        The power of two below which steps no longer shrink.
    """
    # To add a power of two whose last place is the step rounds to that step, ties to even; the sum's fraction then
    # counts the steps, and the power's exponent says which octave they are in.
    shift = _U32(23) - np.asarray(fraction_bits, _U32)
    floor = np.asarray(lowest, np.float32).view(_U32)
    power = _scratch.take("power", magnitudes.size, _U32).reshape(magnitudes.shape)
    np.bitwise_and(magnitudes.view(_U32), _U32(0x7F800000), out=power)
    np.maximum(power, floor, out=power)
    power += shift << _U32(23)
    magnitudes += power.view(np.float32)
    codes = magnitudes.view(_U32)
    codes -= power
    power -= floor + (shift << _U32(23))
    power >>= shift
    codes += power
    return codes


def _check_range(values: Array, beyond: np.float32, scheme: str, remedy: str) -> None:
    largest = np.maximum(values.max(), -values.min())
    if not np.isfinite(largest):
        raise FormatError("some values are not finite, so they cannot be quantized")
    if largest >= beyond:
        raise FormatError(f"the value {largest:.6g} is too large for {scheme}; {remedy}")


def _encode_float16(values: Array, scales: Array, encoded: Array) -> None:
    _check_range(values, np.float32(65520), "float16", "use bfloat16")
    magnitudes = np.abs(values, out=_scratch.take("values", values.size, np.float32))
    codes = _round_to_float(magnitudes, 10, np.float32(2.0**-14))
    signs = np.right_shift(values.view(_U32), _U32(16), out=_scratch.take("power", values.size, _U32))
    signs &= _U32(0x8000)
    codes |= signs
    encoded.view(np.uint16)[:] = codes


def _decode_float16(scales: Array, encoded: Array, count: int) -> Array:
    halves = encoded.view(np.int16)
    _check_halves(halves, 0x7C00)
    # widened with its sign, moved to float32's fraction, and multiplied by the difference of the exponents' biases
    bits = halves.astype(np.int32).view(_U32)
    bits <<= _U32(13)
    bits &= _U32(0x8FFFE000)
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def _encode_bfloat16(values: Array, scales: Array, encoded: Array) -> None:
    _check_range(values, _U32(0x7F7F8000).view(np.float32), "bfloat16", "leave it as it is")
    bits = values.view(_U32)
    codes = np.right_shift(bits, _U32(16), out=_scratch.take("values", values.size, _U32))
    codes &= _U32(1)
    codes += _U32(0x7FFF)
    codes += bits
    codes >>= _U32(16)
    encoded.view(np.uint16)[:] = codes


def _decode_bfloat16(scales: Array, encoded: Array, count: int) -> Array:
    halves = encoded.view(np.uint16)
    _check_halves(halves, 0x7F80)
    bits = halves.astype(_U32)
    bits <<= _U32(16)
    return bits.view(np.float32)


def _check_halves(halves: Array, infinity: int) -> None:
    if (halves & halves.dtype.type(0x7FFF)).max() >= infinity:
        raise FormatError("some quantized values are not finite")


# --- blocks with a scale ---


def _shares(values: Array, block: int) -> tuple[Array, Array]:
    """Return each block's largest magnitude, and the values as shares of it in rows, the last filled up with zeros."""
    blocks = _blocks(values.size, block)
    if values.size % block:
        values = np.concatenate([values, np.zeros(blocks * block - values.size, np.float32)])
    # reduceat is twice as fast as max(axis=1) on short rows
    shares = _scratch.take("values", values.size, np.float32)
    largest = np.maximum.reduceat(np.abs(values, out=shares), np.arange(0, values.size, block))
    if not np.isfinite(largest).all():
        raise FormatError("some values are not finite, so they cannot be quantized")
    divisors = np.where(largest == 0, np.float32(1), largest)
    shares = shares.reshape(blocks, block)
    return largest, np.divide(values.reshape(blocks, block), divisors[:, None], out=shares)


def _check_scales(scales: Array) -> None:
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise FormatError("the scale of a block is not a finite number >= 0")


INT8_BLOCK = 4096

INT8_FRACTION_BITS = np.array([6, 5, 4], _U32)
"""Of each of int8's books: 2**bits codes to an octave."""

INT8_LARGEST = np.array([127, 252, 1984], np.float32)
"""What code 127 stands for in each book, in steps around zero."""

INT8_PEAKS = (3.0, 10.7)
"""Ratio of a block's largest magnitude to its root mean square from which the second and the third book are better.

There the errors cross on samples of generalized normal and of Student's t distributions of growing kurtosis.
"""


def _int8_table() -> Array:
    """Return the share that each byte stands for, one book after the other."""
    magnitudes = np.arange(128)
    books = []
    for bits, largest in zip(INT8_FRACTION_BITS.tolist(), INT8_LARGEST, strict=True):
        octave = magnitudes >> bits
        steps = (magnitudes - (np.maximum(octave - 1, 0) << bits)) * 2.0 ** np.maximum(octave - 1, 0)
        books += [steps / largest, -steps / largest]
    return np.concatenate(books).astype(np.float32)


INT8_TABLE = _int8_table()


def _encode_int8(values: Array, scales: Array, encoded: Array) -> None:
    largest, shares = _shares(values, INT8_BLOCK)
    counts = np.full(len(shares), INT8_BLOCK)
    counts[-1] -= shares.size - values.size
    with np.errstate(divide="ignore"):
        peaks = np.sqrt(counts / np.einsum("ij,ij->i", shares, shares))
    books = np.searchsorted(INT8_PEAKS, peaks)
    # a scale's two lowest bits, a share of 4e-7 of it, say which book its block uses
    scales.view(_U32)[:] = (largest.view(_U32) & ~_U32(3)) | books.astype(_U32)
    bits = INT8_FRACTION_BITS[books][:, None]
    negative = _scratch.take("bytes", shares.size, np.bool_).reshape(shares.shape)
    signs = np.less(shares, 0, out=negative).view(np.uint8)
    signs <<= np.uint8(7)
    np.abs(shares, out=shares)
    shares *= INT8_LARGEST[books][:, None]
    codes = _round_to_float(shares, bits, (_U32(1) << bits).astype(np.float32))
    encoded[:] = codes.reshape(-1)[: values.size]
    encoded |= signs.reshape(-1)[: values.size]


def _decode_int8(scales: Array, encoded: Array, count: int) -> Array:
    books = scales.view(_U32) & _U32(3)
    if books.max() >= len(INT8_LARGEST):
        raise FormatError("a block names a book that int8 does not have")
    plain = (scales.view(_U32) & ~_U32(3)).view(np.float32)
    _check_scales(plain)
    places = _scratch.take("values", len(scales) * INT8_BLOCK, np.uint16)
    places[:count] = encoded
    places[count:] = 0
    places = places.reshape(len(scales), INT8_BLOCK)
    places += (books << _U32(8)).astype(np.uint16)[:, None]
    values = np.take(INT8_TABLE, places, mode="clip")  # "clip" is the mode without a check of each index
    values *= plain[:, None]
    return values.reshape(-1)[:count]


NIBBLE_BLOCK = 64

BOOKS = {
    # the quantiles of the normal distribution, Dettmers et al. 2023 (QLoRA), appendix E
    "nf4": np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
        np.float32,
    ),
    # sign, exponent and fraction as bitsandbytes reads them: the order is not that of the values, and zero is twice
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}  # fmt: skip
"""The share of its block's largest magnitude that each 4-bit code stands for."""


class _Book:
    """Encode and decode by a book of sixteen shares."""

    def __init__(self, shares: Array) -> None:
        ordered, codes = np.unique(shares, return_index=True)
        self._bounds = ((ordered[1:].astype(np.float64) + ordered[:-1]) / 2).astype(np.float32)
        # the byte of two codes for the byte of two ranks
        code_of_rank = np.zeros(16, np.uint8)
        code_of_rank[: len(codes)] = codes
        self._codes = (code_of_rank[:, None] << np.uint8(4) | code_of_rank).reshape(-1)
        self._in_order = bool((self._codes == np.arange(256)).all())
        # the two values of each byte, held as one element of eight bytes so that one look-up finds both
        self._pairs = np.stack([np.repeat(shares, 16), np.tile(shares, 16)], axis=1).view(np.complex64).reshape(-1)

    def encode(self, values: Array, scales: Array, encoded: Array) -> None:
        largest, shares = _shares(values, NIBBLE_BLOCK)
        scales[:] = largest
        # fifteen comparisons of the whole segment are faster than any look-up or search of single values
        flat = shares.reshape(-1)
        ranks, above = _scratch.take("bytes", flat.size, np.uint8), _scratch.take("above", flat.size, np.bool_)
        ranks.fill(0)
        for bound in self._bounds:
            np.greater(flat, bound, out=above)
            ranks += above.view(np.uint8)
        ranks = ranks[: 2 * encoded.size]
        np.left_shift(ranks[::2], np.uint8(4), out=encoded)
        encoded |= ranks[1::2]
        if not self._in_order:
            encoded[:] = self._codes[encoded]

    def decode(self, scales: Array, encoded: Array, count: int) -> Array:
        _check_scales(scales)
        values = np.zeros((len(scales), NIBBLE_BLOCK), np.float32)
        np.take(self._pairs, encoded, out=values.reshape(-1).view(np.complex64)[: encoded.size], mode="clip")
        values *= scales[:, None]
        return values.reshape(-1)[:count]


class Scheme(NamedTuple):
    """Bits of a code, values that share a scale (0: none has one), and the two directions."""

    bits: int
    block: int
    encode: Callable[[Array, Array, Array], None]
    decode: Callable[[Array, Array, int], Array]


SCHEMES = {
    "float16": Scheme(16, 0, _encode_float16, _decode_float16),
    "bfloat16": Scheme(16, 0, _encode_bfloat16, _decode_bfloat16),
    "int8": Scheme(8, INT8_BLOCK, _encode_int8, _decode_int8),
    "fp4": Scheme(4, NIBBLE_BLOCK, (book := _Book(BOOKS["fp4"])).encode, book.decode),
    "nf4": Scheme(4, NIBBLE_BLOCK, (book := _Book(BOOKS["nf4"])).encode, book.decode),
}
"""Every scheme by its name in settings and in metadata."""
