"""What is said about a KL that is negative."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_kit.kl_doctor import Symptoms, diagnose

NEGATIVE = Symptoms(kl=-2.0, error=0.1, gap=1e-6, lean=0.0, train_mode=False, ended=0.4)


@pytest.mark.parametrize(
    ("seen", "cause", "advice"),
    [
        ({}, "the template: ", "base.chat_template"),
        ({"gap": 0.3, "lean": 0.2}, "the sampler was surer", "top-k"),
        ({"gap": 0.3, "lean": -0.2}, "the sampler was less sure", "temperature"),
        ({"gap": 0.3, "train_mode": True}, "the mode: ", "eval()"),
    ],
)
def test_the_likely_cause(seen, cause, advice):
    """Train mode is told first, then a sampler that disagrees; if it agrees, the two policies read different tokens."""
    said = diagnose(replace(NEGATIVE, **seen), "float32")
    assert said is not None and cause in said and advice in said


@pytest.mark.parametrize("seen", [{"kl": 0.5}, {"kl": -0.3}, {"kl": -0.005, "error": 0.0}])
def test_chance_and_rounding_are_not_explained(seen):
    """A KL above 0, one within four standard errors below, and a rounding error."""
    assert diagnose(replace(NEGATIVE, **seen), "float32") is None


def test_a_coarse_type_may_differ_more():
    """In bfloat16 a gap of 0.02 nats is rounding, so it is no sign of another sampler."""
    assert "template" in (diagnose(replace(NEGATIVE, gap=0.02), "bfloat16") or "")
    assert "sampling settings" in (diagnose(replace(NEGATIVE, gap=0.02), "float32") or "")
