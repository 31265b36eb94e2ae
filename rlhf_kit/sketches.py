"""Hashes of texts, and from them which of many rows stand there more than once, or nearly.

Near duplicates are found by MinHash: two rows count as near if six, or another six, of twelve permutations agree on the
least of their shingles, 16 bytes from the beginning of each word (of each letter, in scripts without spaces). Of pairs
that share 95 % of their shingles about 93 % are found, of 80 %: 46 %, of 50 %: 3 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np

__all__ = [
    "BANDS",
    "EMPTY",
    "examples",
    "hashes",
    "laid_out",
    "later",
    "least",
    "mixed",
    "repeated",
    "starts",
    "stripped_hashes",
]

SHINGLE = 16
"""Bytes of a shingle."""
PERMUTATIONS, BANDS = 12, 2
PART, CHUNK = 2**21, 2**16
"""Hashes that are sorted together, and records that are read together."""

# ---------------------------------------------------------------- hashes of texts

EMPTY = np.uint64(hash("") & (2**64 - 1))

_SEEDS = np.random.default_rng(20170612).integers(2**63, size=PERMUTATIONS, dtype=np.uint64)
_ODDS = (_SEEDS | np.uint64(1)).astype(np.uint32)


def hashes(texts: Sequence[str]) -> np.ndarray:
    """Return 64-bit hashes, which hold within this process."""
    return np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64)


def mixed(hashes: np.ndarray, place: int) -> np.ndarray:
    """Return hashes that differ by the place that the hashed thing has."""
    mixed = (hashes + np.uint64(place)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    return mixed * np.uint64(0xBF58476D1CE4E5B9)


def least(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the least hashes [permutations, rows] of the shingles of texts, each of which ends with SHINGLE spaces."""
    starts = offsets[:-1]
    low = data <= 32
    begins = np.empty(len(data), bool)
    begins[1:] = low[:-1] > low[1:]
    if data.max() >= 0xE0:
        begins |= data >= 0xE0  # scripts without spaces: each of their letters begins a shingle
    begins[starts] = True
    words = np.flatnonzero(begins)
    # All pieces of SHINGLE bytes, as opaque elements: three times as fast to pick from as unaligned numbers.
    pieces = np.lib.stride_tricks.as_strided(data[:SHINGLE].view(f"V{SHINGLE}"), (len(data) - SHINGLE + 1,), (1,))
    picked = pieces[words].view(np.uint64) | np.uint64(0x2020202020202020)  # upper case letters become lower case ones
    hashes = picked[::2] * np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(32)
    hashes += picked[1::2]
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    small = (hashes >> np.uint64(32)).astype(np.uint32)
    first, permuted = np.searchsorted(words, starts), np.empty_like(small)
    return np.stack([np.minimum.reduceat(np.multiply(small, odd, out=permuted), first) for odd in _ODDS])


def stripped_hashes(texts: Sequence[str]) -> np.ndarray:
    """Return the hashes of texts without the white space around them; most have none, and keep their hash."""
    return hashes(list(map(str.strip, texts)))


def laid_out(columns: Sequence[Sequence[str]], lengths: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of all rows, each with its texts and SHINGLE spaces, and where each row begins and ends."""
    whole = "\n".join(chain.from_iterable(zip(*columns, repeat(" " * SHINGLE), strict=False))) + "\n"
    data = np.frombuffer(whole.encode(), np.uint8)
    if len(data) > len(whole):
        lengths = [np.array([len(text.encode()) for text in column]) for column in columns]
    sizes = np.sum(lengths, axis=0) + len(columns) + SHINGLE + 1
    return data, np.append(0, np.cumsum(sizes))


# ---------------------------------------------------------------- what stands there more than once


def repeated(file: Any, dtype: np.dtype, name: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield records whose hash `name` occurs more than once: their numbers, themselves, and where each group begins.

    Equal ones stand side by side in the order in which they were written. Every part of the hashes is looked at by
    itself, so that memory does not grow with their number.
    """
    file.flush()
    file.seek(0, 2)
    total = file.tell() // dtype.itemsize
    parts = -(-total // PART)
    for part in range(parts):
        hashes = np.concatenate([
            chunk[name] if parts == 1 else chunk[name][_part(chunk[name], parts) == part]
            for _, chunk in _chunks(file, dtype, total)
        ])  # fmt: skip
        hashes.sort()
        again = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        del hashes
        if not len(again):
            continue
        numbers, records = [], []
        for start, chunk in _chunks(file, dtype, total):
            inside = np.flatnonzero(_among(chunk[name], again))
            numbers.append(inside + start)
            records.append(chunk[inside])
        order = np.argsort(np.concatenate(records)[name], kind="stable")
        ordered = np.concatenate(records)[order]
        yield np.concatenate(numbers)[order], ordered, starts(ordered[name])


def _chunks(file: Any, dtype: np.dtype, total: int) -> Iterator[tuple[int, np.ndarray]]:
    file.seek(0)
    for start in range(0, total, CHUNK):
        yield start, np.frombuffer(file.read(min(CHUNK, total - start) * dtype.itemsize), dtype)


def _part(hashes: np.ndarray, parts: int) -> np.ndarray:
    return (hashes >> np.uint64(40)) % np.uint64(parts)


def _among(hashes: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Return which of the hashes are among some ordered ones."""
    return ordered[np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)] == hashes


def starts(ordered: np.ndarray) -> np.ndarray:
    """Return where another hash begins."""
    return np.flatnonzero(np.append(len(ordered) > 0, ordered[1:] != ordered[:-1]))


def later(rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return all rows but the first of each group."""
    later = np.ones(len(rows), bool)
    later[starts] = False
    return rows[later]


def examples(rows: np.ndarray, starts: np.ndarray, wanted: int) -> list[list[int]]:
    """Return the first two rows of the groups of several that come first."""
    several = np.flatnonzero(np.diff(np.append(starts, len(rows))) > 1)
    chosen = several[np.argsort(rows[starts[several]])][: max(wanted, 0)]
    return [[int(rows[starts[group]]), int(rows[starts[group] + 1])] for group in chosen]
