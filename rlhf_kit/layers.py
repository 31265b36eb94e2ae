"""How the layers of a frozen base with adapters compute what they compute: in fewer passes over memory, and with less
kept for the way back.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeGuard

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_kit.maths.products import FrozenMatrix, packs, product

# ---------------------------------------------------------------- frozen weights


def multiply_packed(causal: nn.Module, trunk: nn.Module) -> None:
    """Let those linear layers of a frozen model's trunk that gain by it multiply as `FrozenMatrix` does.

    Their weights are then in it alone; what a layer shows is NaN, in the same shape. Parameters that stay as they are
    get memory of their own: one that is a piece of the mapped checkpoint keeps all of that file in memory.
    """
    gaining = [
        layer for layer in trunk.modules() if gains_packed(layer) and packs(layer.weight.device, layer.weight.dtype)
    ]
    others = {id(parameter): parameter for parameter in causal.parameters()}
    for layer in gaining:
        others.pop(id(layer.weight), None)
        weight, matrix = layer.weight, FrozenMatrix(layer.weight, layer.bias)
        matrix.keep_packed_alone()
        setattr(layer, "forward", matrix)  # noqa: B010  (to mypy it is a method)
        layer.weight = nn.Parameter(weight.new_tensor(math.nan).expand_as(weight), requires_grad=False)
    for parameter in others.values() if gaining else ():
        parameter.data = parameter.data.clone()


def gains_packed(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer is a linear one that only multiplies, and has not been packed; kinds of it do more."""
    return type(layer) is nn.Linear and "forward" not in vars(layer)


def keep_no_inputs_of_8bit(model: nn.Module) -> None:
    """Let bitsandbytes' 8-bit layers of a frozen model keep nothing for the way back.

    By themselves they keep their input, which only a gradient of their weights would need, and keep it where activation
    checkpointing does not reach it.
    """
    from bitsandbytes.nn import Linear8bitLt

    for layer in model.modules():
        if isinstance(layer, Linear8bitLt):
            setattr(layer, "forward", functools.partial(_times_8bit, layer))  # noqa: B010


def _times_8bit(layer: Any, x: Tensor) -> Tensor:
    return _EightBitProduct.apply(x, layer) if torch.is_grad_enabled() else type(layer).forward(layer, x)


class _EightBitProduct(torch.autograd.Function):
    """What a frozen 8-bit layer makes of x, with the gradient that it has itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return type(layer).forward(layer, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (slope,), state = upstream, ctx.layer.state
        weight = state.CB.to(slope.dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1 / 127))
        return slope @ weight, None


# ---------------------------------------------------------------- adapters


def adapt_in_few_passes(layers: Iterable[nn.Module], role: str) -> None:
    """Give those layers that have a linear adapter of a role the forward pass of `_adapted`."""
    for layer in layers:
        if _is_linear(layer, role):
            setattr(layer, "forward", types.MethodType(_adapted, layer))  # noqa: B010


def _is_linear(layer: nn.Module, role: str) -> bool:
    return isinstance(layer, LoraLayer) and role in layer.lora_A and isinstance(layer.lora_A[role], nn.Linear)


def _adapted(self: LoraLayer, x: Tensor) -> Tensor:
    """The forward pass of a linear layer with the active role's adapter: W x + scaling B A x.

    What PEFT computes, in fewer passes over memory; they are most of the time that an adapter costs on a CPU.
    """
    (role,) = self.active_adapters
    if self.disable_adapters or role not in self.lora_A:  # roles may adapt different layers
        return self.base_layer(x)
    rows = x.flatten(0, -2)
    result = self.base_layer(rows)
    down, up = self.lora_A[role].weight, self.lora_B[role].weight
    total = _PlusLowRank.apply(result.to(down.dtype), rows, down, up, self.scaling[role])
    return total.to(result.dtype).unflatten(0, x.shape[:-1])


class _PlusLowRank(torch.autograd.Function):
    """y + scaling x A^T B^T, written over y [n, O], of x [n, I], A [r, I] and B [O, r].

    It is computed in the precision of y, A and B; x is kept in its own.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        low = product(x.to(down.dtype), down)
        ctx.save_for_backward(x, low, down, up)
        ctx.scaling = scaling
        ctx.mark_dirty(y)
        return y.addmm_(low, up.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, low, down, up = ctx.saved_tensors
        (slope,) = upstream
        d_low = product(slope, up.t()).mul_(ctx.scaling)
        _, for_x, for_down, for_up, _ = ctx.needs_input_grad
        d_x = product(d_low, down.t()).to(x.dtype) if for_x else None
        d_down = product(d_low.t(), x.to(down.dtype).t()) if for_down else None
        d_up = (slope.t() @ low).mul_(ctx.scaling) if for_up else None
        return slope, d_x, d_down, d_up, None


@contextmanager
def folded(layers: Iterable[LoraLayer], role: str) -> Iterator[bool]:
    """Within the block, the products of packed `layers` are with W + scaling B A, a role's adapter in them.

    Yields whether they are: all that the role adapts, or none. Other roles cannot be used within.
    """
    own = [layer for layer in layers if role in (*layer.lora_A, *layer.lora_embedding_A)]
    foldable = all(_is_linear(layer, role) and _is_packed(layer.base_layer) for layer in own)
    with ExitStack() as changed:
        for layer in own if foldable else ():
            down, up = layer.lora_A[role].weight.detach(), layer.lora_B[role].weight.detach()
            matrix = layer.base_layer.forward
            changed.enter_context(matrix.instead(torch.addmm(matrix.weight, up, down, alpha=layer.scaling[role])))
        yield foldable


def _is_packed(layer: nn.Module) -> bool:
    return isinstance(layer.forward, FrozenMatrix) and layer.forward.packed is not None


# ---------------------------------------------------------------- what is kept for the way back


def can_compute_again(model: nn.Module) -> bool:
    """Return whether a model of transformers has layers for `compute_again`, and says that they can be."""
    able: bool = getattr(model, "supports_gradient_checkpointing", False)
    return able and any(isinstance(layer, GradientCheckpointingLayer) for layer in model.modules())


def compute_again(trunk: nn.Module, as_now: Callable[[], AbstractContextManager[Any]]) -> None:
    """Let each layer of a trunk keep its inputs alone for the way back, and compute the rest again there.

    as_now: called on the way there; returns the context in which to compute again, for one way back.

    Source: Chen et al. 2016 (arXiv 1604.06174), "Training deep nets with sublinear memory cost". transformers' own
    does it in train mode alone, and torch's would compute again with the adapter that is then active.
    """
    for layer in trunk.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            setattr(layer, "forward", functools.partial(_computed_again, layer.forward, as_now))  # noqa: B010


def _computed_again(
    forward: Callable[..., Any], as_now: Callable[[], AbstractContextManager[Any]], *inputs: Any, **settings: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **settings)
    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn
        context_fn=lambda: (nullcontext(), as_now()),
        **settings,
    )


def keep_less(trunk: nn.Module, dtype: torch.dtype) -> None:
    """Give the gated feed-forward blocks of a trunk, Llama's and those like it, the forward pass of `_gated`.

    dtype: of the trunk's arithmetic.
    """
    some = next(trunk.parameters())
    for block in trunk.modules():
        if _is_gated(block, some.device, dtype):
            setattr(block, "forward", functools.partial(_gated, block))  # noqa: B010


@torch.no_grad()
def _is_gated(block: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a block has the parts of a gated one and, where there are numbers, computes what `_gated` does.

    The numbers are small and large ones, for there are blocks that cut off large ones.
    """
    if not all(hasattr(block, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    width = getattr(block.gate_proj, "in_features", None)
    if width is None or len(inspect.signature(block.forward).parameters) != 1:
        return False
    scales = torch.tensor([[1.0], [30.0], [1000.0]], device=device, dtype=dtype)
    x = scales * torch.linspace(-2, 2, 3 * width, device=device, dtype=dtype).view(3, width)
    return x.is_meta or torch.allclose(block(x), _gated(block, x), rtol=0, atol=0, equal_nan=True)


def _gated(self: Any, x: Tensor) -> Tensor:
    """The forward pass down(act(gate x) * up x), of which only gate x and up x are kept for the way back.

    Their product is made again there.
    """
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not torch.is_grad_enabled():
        return self.down_proj(self.act_fn(gate) * up)
    hidden = _Gated.apply(gate, up, self.act_fn)
    gate, up = gate.detach(), up.detach()
    with _made_again(hidden, lambda: self.act_fn(gate) * up):
        return self.down_proj(hidden)


class _Gated(torch.autograd.Function):
    """act(gate) * up, of which gate and up are kept for the way back."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            acted = ctx.act(gate)
        (d_gate,) = torch.autograd.grad(acted, gate, upstream[0] * up)
        return d_gate, upstream[0] * acted.detach(), None


@contextmanager
def _made_again(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Within the block, what would be kept of a tensor for the way back is made again there."""
    there = weakref.ref(tensor)  # a graph keeps its hooks, and with them what they hold

    def kept(saved: Tensor) -> Tensor | torch.Size:
        whole = there()
        same = whole is not None and (saved is whole or saved._base is whole) and saved.numel() == whole.numel()
        return saved.shape if same and saved.is_contiguous() else saved

    def given_back(kept: Tensor | torch.Size) -> Tensor:
        return make().view(kept) if isinstance(kept, torch.Size) else kept

    with torch.autograd.graph.saved_tensors_hooks(kept, given_back):
        yield
