"""Log-probabilities of tokens, whole and in blocks of the vocabulary, and sampling."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.maths import logprobs
from rlhf_kit.maths.logprobs import OutputHead, sample_inverse_cdf, token_logprobs
from tests.maths import oracle

logit_rows = st.lists(st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5), min_size=1, max_size=4)


def of_logits(logits, ids, temperature=1.0):
    """Log-probabilities where the bias makes the logits, the same for all tokens; three entries at a time."""
    assert bool((logits == logits[0]).all())
    head = OutputHead(torch.zeros(logits.shape[-1], 4, dtype=logits.dtype), logits[0])
    hidden = torch.ones(len(ids), 4, dtype=logits.dtype)
    return token_logprobs(hidden, head, ids, temperature, entries=3 * len(ids))


def test_logprobs_by_hand():
    """Logits log 1, log 2, log 5 are probabilities 1/8, 2/8, 5/8; at temperature 1/2 they are 1, 4, 25 of 30."""
    logits = torch.tensor([1.0, 2.0, 5.0]).log().expand(3, 3)
    ids = torch.tensor([0, 1, 2])
    torch.testing.assert_close(of_logits(logits, ids).exp(), torch.tensor([1 / 8, 2 / 8, 5 / 8]))
    torch.testing.assert_close(of_logits(logits, ids, 0.5).exp(), torch.tensor([1 / 30, 4 / 30, 25 / 30]))


@given(logit_rows, st.floats(0.25, 4))
def test_logprobs_agree_with_their_definition(rows, temperature):
    """Every token of every row, at any temperature."""
    for row in rows:
        expected = oracle.log_softmax(row, temperature)
        found = of_logits(torch.tensor(row).expand(5, 5), torch.arange(5), temperature)
        assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    """32,000 equal logits in bfloat16 give -log 32000 to float32 precision, where bfloat16 knows 1/16."""
    logprob = of_logits(torch.zeros(1, 32_000, dtype=torch.bfloat16), torch.tensor([7]))
    assert logprob.dtype == torch.float32
    assert logprob.item() == pytest.approx(-math.log(32_000), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    """Dividing by it would give infinities or turn the distribution over."""
    with pytest.raises(ValueError, match="temperature"):
        of_logits(torch.zeros(2, 3), torch.tensor([0, 1]), temperature)


HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-2, 2, 20)},
    "scaled": {"scale": 0.25},
    "capped": {"cap": 3.0},
    "all": {"bias": torch.linspace(-2, 2, 20), "scale": 0.5, "cap": 3.0},
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("block", [1, 7, 20])
@pytest.mark.parametrize("entries", [1, 30, 1000])
def test_blocks_change_neither_values_nor_gradients(monkeypatch, entries, block, kind, temperature):
    """Values and gradients are those of a plain log-softmax, for heads that add, scale, bend."""
    monkeypatch.setitem(logprobs.BLOCK, "cpu", block)
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8), torch.randn(20, 8)
    ids, upstream = torch.randint(20, (10,)), torch.randn(10)
    head = OutputHead(weight, **HEADS[kind])

    def by_definition(h):
        logits = (h @ weight.T + (0 if head.bias is None else head.bias)) * head.scale
        if head.cap is not None:
            logits = head.cap * torch.tanh(logits / head.cap)
        return (logits / temperature).log_softmax(-1)[range(10), ids]

    def results(function):
        h = hidden.clone().requires_grad_()
        out = function(h)
        (out * upstream).sum().backward()
        return [out, h.grad]

    found = results(lambda h: token_logprobs(h, head, ids, temperature, entries))
    torch.testing.assert_close(found, results(by_definition))
    plain = (hidden @ weight.T + (0 if head.bias is None else head.bias)) * head.scale
    torch.testing.assert_close(head(hidden), plain if head.cap is None else head.cap * torch.tanh(plain / head.cap))


def test_with_and_without_gradients_the_values_are_the_same():
    """Bit for bit: the first ratio of a PPO update is 1."""
    torch.manual_seed(0)
    hidden, head, ids = torch.randn(10, 8), OutputHead(torch.randn(300, 8)), torch.randint(300, (10,))
    learning = token_logprobs(hidden.requires_grad_(), head, ids, 0.9, 400)
    assert learning.requires_grad
    with torch.no_grad():
        assert torch.equal(token_logprobs(hidden, head, ids, 0.9, 400), learning)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_lower_precision_stay_close(dtype):
    """The sum over the vocabulary is kept in float32; its products have the precision of the weights."""
    torch.manual_seed(0)
    weight, hidden, ids = torch.randn(2000, 16) / 4, torch.randn(6, 16), torch.randint(2000, (6,))
    exact = hidden.clone().requires_grad_()
    (exact @ weight.T).log_softmax(-1)[range(6), ids].sum().backward()
    found = hidden.to(dtype).requires_grad_()
    token_logprobs(found, OutputHead(weight.to(dtype)), ids, 1.0, 600).sum().backward()
    assert found.grad.dtype == dtype
    torch.testing.assert_close(found.grad.float(), exact.grad, rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_impossible_and_huge_logits(monkeypatch):
    """Blocks in which nothing is possible count for nothing; one huge logit leaves the others their true distance."""
    monkeypatch.setitem(logprobs.BLOCK, "cpu", 2)
    bias = torch.tensor([-math.inf, -math.inf, 0.0, 0.0, -math.inf, 1000.0])
    head, ids = OutputHead(torch.zeros(6, 2), bias), torch.tensor([2, 5, 0])
    found = token_logprobs(torch.zeros(3, 2), head, ids, 1.0, entries=6)
    assert found.tolist() == [-1000.0, 0.0, -math.inf]


@pytest.mark.parametrize("grad", [False, True])
def test_no_more_logits_than_asked_for_are_alive(monkeypatch, grad):
    """Of 12 tokens with 50 entries, 60 logits at a time, made once also for gradients."""
    made = []
    monkeypatch.setitem(logprobs.BLOCK, "cpu", 10)
    logits_of = OutputHead.logits
    monkeypatch.setattr(OutputHead, "logits", lambda *a: made.append(logits_of(*a)) or made[-1])
    hidden = torch.randn(12, 8, requires_grad=grad)
    logprob = token_logprobs(hidden, OutputHead(torch.randn(50, 8)), torch.zeros(12, dtype=torch.long), 1.0, 60)
    if grad:
        logprob.sum().backward()
    assert [logits.shape for logits in made] == 10 * [(6, 10)]


def test_no_tokens_have_no_logprobs():
    """A process whose share is empty gets an empty tensor, still joined to the graph."""
    hidden = torch.zeros(0, 8, requires_grad=True)
    out = token_logprobs(hidden, OutputHead(torch.zeros(5, 8)), torch.zeros(0, dtype=torch.long), 1.0, 4)
    assert out.shape == (0,)
    out.sum().backward()


def test_sampling_by_hand():
    """With probabilities 1/8, 2/8, 5/8 the tokens' shares of [0, 1) are cut at 1/8 and 3/8; a cut opens the next."""
    uniform = torch.tensor([0.0, 0.124, 0.126, 0.374, 0.376, 0.999])
    ids = sample_inverse_cdf(torch.tensor([1.0, 2.0, 5.0]).log().expand(6, 3), uniform)
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_number_on_a_cut_draws_the_next_token():
    """Four equal tokens, whose shares of [0, 1) begin at 0, 1/4, 1/2 and 3/4, each with its beginning."""
    ids = sample_inverse_cdf(torch.zeros(4, 4), torch.tensor([0.0, 0.25, 0.5, 0.75]))
    assert ids.tolist() == [0, 1, 2, 3]


def test_a_sum_that_rises_on_an_impossible_token_does_not_draw_it(monkeypatch):
    """A parallel scan may round differently from one token to the next, as if one of probability 0 had some."""
    cumsum = torch.Tensor.cumsum
    rise = torch.zeros(256).index_fill(0, torch.tensor([1]), 1e-7)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: cumsum(x, dim) + rise[: x.shape[-1]])
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    ids = sample_inverse_cdf(logits, torch.tensor([0.5]))
    assert ids.tolist() == [2]
    # the same with whole spans of 256: all that is in the second one is impossible
    ids = sample_inverse_cdf(logits.repeat_interleave(256, dim=1), torch.tensor([0.5]))
    assert ids.tolist() == [512]


def test_sampled_shares_are_the_probabilities():
    """Evenly spread uniforms draw each token as often as its probability says, at a temperature too."""
    n, temperature = 10_000, 0.5
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    uniform = (torch.arange(n) + 0.5) / n
    ids = sample_inverse_cdf(logits.expand(n, 4), uniform, temperature)
    expected = [math.exp(lp) for lp in oracle.log_softmax(logits.tolist(), temperature)]
    assert (torch.bincount(ids, minlength=4) / n).tolist() == pytest.approx(expected, abs=1.5 / n)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24, 1 - 2**-40, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_zero_is_never_drawn(uniform, dtype):
    """Not at either edge: forbidden tokens stand first and last, and 1 - 2^-40 rounds to 1 in float32."""
    logits = torch.full((3, 1000), -math.inf)
    logits[0, [5, 6]] = 0.0
    logits[1, [1]] = 0.0
    logits[2, 1:-1] = torch.linspace(-300, 0, 998)  # underflows to probability 0 without being -inf
    ids = sample_inverse_cdf(logits, torch.full((3,), uniform, dtype=dtype))
    assert (logits.softmax(-1).gather(1, ids[:, None]) > 0).all()


@pytest.mark.parametrize("vocabulary", [256, 257, 1000, 32_000])
def test_sampling_in_spans_is_sampling(vocabulary):
    """Over many spans, whole or not, the token drawn is the first whose cumulative probability exceeds the number."""
    torch.manual_seed(0)
    logits, uniform = 3 * torch.randn(200, vocabulary), torch.rand(200)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    ids = sample_inverse_cdf(logits, uniform)
    at, before = (cumulative.gather(1, (ids - step).clamp(min=0)[:, None]).squeeze(1) for step in (0, 1))
    assert (at >= uniform - 1e-5).all() and ((before <= uniform + 1e-5) | (ids == 0)).all()


def test_a_draw_depends_on_its_own_row_only():
    """The same logits and number draw the same token whatever else is in the batch."""
    torch.manual_seed(0)
    logits, uniform = torch.randn(50, 300), torch.rand(50)
    together = sample_inverse_cdf(logits, uniform)
    alone = [sample_inverse_cdf(logits[i : i + 1], uniform[i : i + 1]).item() for i in range(50)]
    assert together.tolist() == alone
