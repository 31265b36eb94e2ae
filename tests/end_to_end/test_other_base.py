"""An adapter is used on the base it was made on, or not at all."""

from __future__ import annotations

from tests import tiny
from tests.end_to_end import chain


def test_an_adapter_made_for_another_base_is_refused(tmp_path):
    """A stage that would build on an adapter of another base stops with what changed, and leaves nothing behind."""
    recipe = chain.write_chain(tmp_path)
    out = tmp_path / "run"
    first = chain.run("run", str(recipe), "--out", str(out), "--only", "sft")
    assert first.returncode == 0, first.stderr[-2000:]
    other = tiny.make_checkpoint(tmp_path / "other", seed=5)
    before = sorted(out.rglob("*"))
    result = chain.run("run", str(recipe), "--out", str(out), "--only", "reward", "--set", f"base.model={other}")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "sft" in result.stderr
    assert "base.sha256" in result.stderr
    assert sorted(out.rglob("*")) == before
