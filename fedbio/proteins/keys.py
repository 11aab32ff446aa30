"""Number the keys of millions of proteins in little memory: about 25 bytes each, where a dictionary takes 200."""

from __future__ import annotations

__all__ = ["KEY_BYTES", "KeyTable"]

from array import array

KEY_BYTES = 16
"""Bytes of a key: of a cryptographic digest so many tell any number of proteins apart."""


class KeyTable:
    """Numbers for keys in the order in which they come first: 0, 1, 2, ...

    A hash table with open addressing and linear probing (Knuth, The Art of Computer Programming 3, section 6.4,
    algorithm L); keys are digests, so their first bytes are the hash.

    Examples
    --------
    >>> table = KeyTable()
    >>> [table.add(bytes([number] * 16)) for number in (7, 9, 7)]
    [0, 1, 0]
    >>> table.find(bytes(16))
    -1
    """

    def __init__(self) -> None:
        self._keys = bytearray()
        self._slots = array("i", [-1]) * 1024
        self._mask = 1023
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, key: bytes) -> int:
        """Return the number of a key of `KEY_BYTES` bytes, a new one if it has none; then it is ``len(self) - 1``."""
        slot = self._slot_of(key)
        number = self._slots[slot]
        if number >= 0:
            return number
        number = self._count
        self._slots[slot] = number
        self._keys += key
        self._count = number + 1
        # two thirds full: a search looks at two slots on average
        if 3 * self._count > 2 * len(self._slots):
            self._grow()
        return number

    def find(self, key: bytes) -> int:
        """Return the number of a key, or -1."""
        return self._slots[self._slot_of(key)]

    def _slot_of(self, key: bytes) -> int:
        keys, slots, mask = self._keys, self._slots, self._mask
        slot = int.from_bytes(key[:8], "little") & mask
        while (number := slots[slot]) >= 0:
            place = number * KEY_BYTES
            if keys[place : place + KEY_BYTES] == key:
                break
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        size = 2 * len(self._slots)
        slots, mask, keys = array("i", [-1]) * size, size - 1, self._keys
        self._slots = slots  # the old one is not needed to fill the new one
        for number in range(self._count):
            place = number * KEY_BYTES
            slot = int.from_bytes(keys[place : place + 8], "little") & mask
            while slots[slot] >= 0:
                slot = (slot + 1) & mask
            slots[slot] = number
        self._mask = mask
