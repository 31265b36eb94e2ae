"""Products with frozen matrices, from the copy of them that a CPU multiplies fastest with."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128
"""How many rows of numbers a layout is chosen for; it is the same one for all but a single row."""


class FrozenMatrix:
    """W [O, I], which learns nothing, to be multiplied with rows of numbers: x W^T + b.

    On a CPU with x86's instructions, in float32, products are made from W in oneDNN's own layout (`packed`). Compared
    with the plain product, one of few rows, as in decoding, then takes half the time and one of many rows a seventh
    less, and what comes out for a row does not depend on how many others there are. Everywhere else it is
    the plain product; the gradient is `product`'s.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [O, I], which is not to change from here on. bias: [O]."""
        self.bias = None if bias is None else bias.detach()
        self.packed = self.multiplied_by = _packed(weight.detach())
        self._plain: Tensor | None = weight.detach()

    @property
    def weight(self) -> Tensor:
        """W [O, I] as it was given."""
        if self._plain is not None:
            return self._plain
        assert self.packed is not None
        return self.packed.to_dense()

    def keep_packed_alone(self) -> None:
        """Hold W once, if it is packed: for each gradient it is unpacked, which takes a twentieth of the product."""
        if self.packed is not None:
            self._plain = None

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b [..., O] of x [..., I], with x's gradient."""
        return _Product.apply(x, self) if torch.is_grad_enabled() else self.times(x)

    def times(self, x: Tensor) -> Tensor:
        """The same without a gradient."""
        if self.multiplied_by is None:
            return torch.nn.functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.multiplied_by, self.bias, "none", [], "")

    @contextmanager
    def instead(self, weight: Tensor) -> Iterator[None]:
        """Within the block, the products of a packed W are with another weight [O, I]; gradients stay W's own."""
        before, packed = self.multiplied_by, _packed(weight)
        self.multiplied_by = packed
        try:
            yield
        finally:
            self.multiplied_by = before


def _packed(weight: Tensor) -> Tensor | None:
    if not packs(weight.device, weight.dtype):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether frozen matrices there are packed."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T [..., O] of x [..., I] and W [O, I], without a gradient.

    oneDNN takes either as it is when it lies the other way round, as in gradients, and then needs a tenth less than the
    plain product, and a quarter to two fifths less where one side is short, as an adapter's rank.
    """
    if x.shape[-1] and packs(x.device, x.dtype):  # it knows no sums over nothing
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.nn.functional.linear(x, weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: FrozenMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.times(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return product(upstream[0], ctx.matrix.weight.t()), None
