"""Products with frozen matrices are the plain products, in the layout of a CPU too."""

import platform

import pytest
import torch

from rlhf_kit.maths.products import FrozenMatrix, product


def matrix(outputs, inputs, bias, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5
    return weight, torch.randn(outputs, dtype=dtype) if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (2, 65)])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 3), (96, 64), (130, 257)])
def test_value_and_gradient_are_those_of_a_linear_layer(outputs, inputs, shape, bias):
    """Of rows in any number of dimensions, widths that no register divides, with and without a bias."""
    weight, offset = matrix(outputs, inputs, bias)
    x, upstream = torch.randn(*shape, inputs), torch.randn(*shape, outputs)
    frozen = FrozenMatrix(weight, offset)

    def results(function):
        rows = x.clone().requires_grad_()
        out = function(rows)
        out.backward(upstream)
        return out, rows.grad

    torch.testing.assert_close(results(frozen), results(lambda rows: torch.nn.functional.linear(rows, weight, offset)))
    assert torch.equal(frozen.times(x), frozen(x))


def test_rows_that_are_not_contiguous():
    """A slice of a larger tensor, and one laid out the other way round."""
    weight, _ = matrix(24, 16, False)
    frozen, wide = FrozenMatrix(weight), torch.randn(9, 40)
    for rows in (wide[:, 3:19], torch.randn(16, 9).t(), wide[::2, :16]):
        torch.testing.assert_close(frozen(rows), rows @ weight.t())


def test_no_rows_give_no_results():
    """A process whose share is empty."""
    frozen = FrozenMatrix(matrix(6, 4, False)[0])
    assert frozen(torch.zeros(0, 4)).shape == (0, 6)
    assert product(torch.zeros(0, 4), torch.ones(6, 4)).shape == (0, 6)
    assert torch.equal(product(torch.zeros(2, 0), torch.ones(6, 0)), torch.zeros(2, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (1, 16, 3), (7, 5, 16), (130, 257, 16), (16, 652, 31)]
)
def test_a_product_of_either_side_the_other_way_round(rows, inputs, outputs, dtype):
    """What the gradients of matrices and adapters are made of."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    exact, tolerance = x.double() @ weight.double().t(), {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for left in (x, x.t().contiguous().t()):
        for right in (weight, weight.t().contiguous().t()):
            found = product(left, right)
            assert found.dtype == dtype
            assert (found.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 CPUs have the packed layout")
def test_what_comes_out_for_a_row_does_not_depend_on_the_others():
    """Bit for bit, from two rows on: so a completion is the same in any batch."""
    frozen, x = FrozenMatrix(matrix(130, 96, False)[0]), torch.randn(70, 96)
    assert frozen.packed is not None
    whole = frozen.times(x)
    for rows in (2, 3, 8, 31, 33, 64):
        assert torch.equal(frozen.times(x[:rows]), whole[:rows])


def test_the_packed_copy_is_enough():
    """The weight that comes out of it, and the gradient, are those from before, to the bit."""
    weight, offset = matrix(130, 257, True)
    frozen, x, upstream = FrozenMatrix(weight, offset), torch.randn(9, 257, requires_grad=True), torch.randn(9, 130)
    before = torch.autograd.grad(frozen(x), x, upstream)[0]
    frozen.keep_packed_alone()
    assert torch.equal(frozen.weight, weight)
    assert torch.equal(torch.autograd.grad(frozen(x), x, upstream)[0], before)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 CPUs have the packed layout")
def test_another_weight_takes_the_place_for_a_block():
    """And no longer, whatever ends the block."""
    weight, offset = matrix(24, 16, True)
    frozen, x, other = FrozenMatrix(weight, offset), torch.randn(5, 16), torch.randn(24, 16)
    before = frozen.times(x)
    with pytest.raises(KeyError), frozen.instead(other):
        torch.testing.assert_close(frozen.times(x), x @ other.t() + offset)
        raise KeyError
    assert torch.equal(frozen.times(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_not_packed(dtype):
    """They take the plain product, which is exact."""
    weight, _ = matrix(6, 4, False, dtype)
    frozen, x = FrozenMatrix(weight), torch.randn(3, 4, dtype=dtype)
    assert frozen.packed is None
    assert torch.equal(frozen(x), x @ weight.t())


def test_weights_without_numbers_are_not_packed():
    """Those of a rehearsal, which are on no device."""
    with torch.device("meta"):
        frozen, x = FrozenMatrix(torch.empty(6, 4)), torch.empty(3, 4)
    assert frozen.packed is None
    assert frozen(x).shape == (3, 6)
