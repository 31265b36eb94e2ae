"""Completions of several lengths as hypothesis draws them, and as the padded tensors that the maths takes."""

import torch
from hypothesis import strategies as st
from torch import Tensor

numbers = st.floats(-3, 3, width=32)


@st.composite
def completions(draw, fields: int = 2):
    """A list of completions, each a tuple of `fields` equally long lists of numbers (1 to 7 tokens)."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    return [tuple(draw(st.lists(numbers, min_size=n, max_size=n)) for _ in range(fields)) for n in lengths]


def padded(rows: list[list[float]], extra: int = 0, fill: float = 99.0) -> Tensor:
    """The rows as float64 [B, C], right-padded with a number that must not matter, `extra` columns more than needed."""
    width = max(map(len, rows)) + extra
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.float64)


def mask_of(rows: list[list[float]], extra: int = 0) -> Tensor:
    """The mask [B, C] of `padded(rows, extra)`."""
    width = max(map(len, rows)) + extra
    return torch.tensor([[t < len(row) for t in range(width)] for row in rows])


def unpadded(x: Tensor, mask: Tensor) -> list[list[float]]:
    """The rows' real numbers."""
    return [row[m].tolist() for row, m in zip(x, mask, strict=True)]
