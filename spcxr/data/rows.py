"""A set of a store's rows that stays small: a bit a row, where a list of them takes 64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK = 64  # bytes between two counts: an eighth of the mask's size is added
_ONES = np.array([value.bit_count() for value in range(256)], np.uint8)
# _PLACE[byte, k]: the place (0 to 7) of the byte's one bit number k, from the lowest.
_PLACE = np.array(
    [sorted(range(8), key=lambda bit: (not value >> bit & 1, bit)) for value in range(256)],
    np.uint8,
)


@dataclass(frozen=True)
class RowSet:
    """Distinct rows in ascending order, in 1.13 bits for each row between the first and the last.

    ``len(rows)`` is how many; ``rows[positions]`` are the rows at these positions. 10^8 rows take
    14 MB, and 10^4 of them are looked up in a few milliseconds.

    Attributes
    ----------
    bits
        ``(blocks, 64)`` uint8: which rows are in it, lowest bit first.
    starts
        ``(blocks + 1,)`` int64: how many of its rows come before each block.
    first
        row number of the first bit.

    >>> rows = RowSet.of_mask(np.array([False, True, True, False, True]))
    >>> len(rows), rows[np.array([2, 0, 0])]
    (3, array([4, 1, 1]))
    """

    bits: NDArray[np.uint8]
    starts: NDArray[np.int64]
    first: int = 0

    @classmethod
    def of_mask(cls, mask: NDArray[np.bool_], *, first: int = 0) -> RowSet:
        """The rows that are true in a mask ``(n,)``, whose own row numbers begin at ``first``."""
        packed = np.packbits(mask, bitorder="little")
        bits = np.zeros((-(-len(packed) // _BLOCK), _BLOCK), np.uint8)
        bits.reshape(-1)[: len(packed)] = packed
        starts = np.zeros(len(bits) + 1, np.int64)
        np.cumsum(_ONES[bits].sum(axis=1), out=starts[1:])
        return cls(bits, starts, first)

    @classmethod
    def from_rows(cls, rows: NDArray[np.int64]) -> RowSet:
        """The set of these row numbers ``(n,)``; neither order nor repetition is kept.

        >>> RowSet.from_rows(np.array([1000, 7]))[np.arange(2)]
        array([   7, 1000])
        """
        if len(rows) == 0:
            return cls.of_mask(np.zeros(0, bool))
        first = int(rows.min())
        if first < 0:
            raise IndexError(f"row {first}; rows are numbered from 0")
        mask = np.zeros(int(rows.max()) - first + 1, bool)
        mask[rows - first] = True
        return cls.of_mask(mask, first=first)

    def holds(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``(m,)`` bool: whether each of these rows ``(m,)`` is in the set.

        >>> RowSet.from_rows(np.array([7, 1000])).holds(np.array([6, 7, 2000]))
        array([False,  True, False])
        """
        place = rows - self.first
        inside = (place >= 0) & (place < self.bits.size * 8)
        place = np.where(inside, place, 0)
        found = np.zeros(len(rows), bool)
        if self.bits.size:
            found = (self.bits.reshape(-1)[place >> 3] >> (place & 7) & 1).astype(bool)
        return found & inside

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows at these positions: int64 of their shape.

        Raises
        ------
        IndexError
            a position that is negative, or not below the set's length.
        """
        wanted = np.asarray(positions, np.int64)
        flat = wanted.reshape(-1)
        if flat.size and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"position out of range; the set has {len(self)} rows")
        block = np.searchsorted(self.starts, flat, side="right") - 1
        rest = flat - self.starts[block]
        bits = self.bits[block]
        before = np.cumsum(_ONES[bits], axis=1, dtype=np.int64)  # ones up to and with each byte
        byte = (before <= rest[:, None]).sum(axis=1)
        found = bits[np.arange(len(flat)), byte]
        rest -= before[np.arange(len(flat)), byte] - _ONES[found]
        rows = (block * _BLOCK + byte) * 8 + _PLACE[found, rest] + self.first
        return rows.reshape(wanted.shape)
