"""Read the pieces of a SentencePiece model, which is all that is needed to know what rows of a token table stand for.

The file is one protocol-buffer message, ``ModelProto``; its field 1 is repeated and holds a piece each, whose field 1
is the text [1]_. The other fields are passed over.

References
----------
.. [1] google/sentencepiece, src/sentencepiece_model.proto
"""

from __future__ import annotations

__all__ = ["model_pieces"]

from collections.abc import Iterator

from fedbio.errors import FormatError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES = _TEXT = 1
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


def model_pieces(content: bytes, *, where: str) -> tuple[str, ...]:
    """Return the pieces of a model in the order of their numbers.

    Raises
    ------
    FormatError
        If the bytes are not a SentencePiece model.
    """
    try:
        return tuple(
            text.decode()
            for number, piece in _fields(content)
            if number == _PIECES
            for inner, text in _fields(piece)
            if inner == _TEXT
        )
    except ValueError as error:
        raise FormatError(f"{where}: not a SentencePiece model ({error}); get a fresh copy") from error


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields of a message that hold bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, at = _varint(message, at)
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in _FIXED_SIZES:
            size = _FIXED_SIZES[kind]
        else:
            raise ValueError(f"a field of unknown kind {kind}")
        if at + size > len(message):
            raise ValueError("a field longer than the message")
        if kind == _BYTES:
            yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if at >= len(message):
            raise ValueError("the message ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
