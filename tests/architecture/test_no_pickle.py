"""Nothing is unpickled and no foreign code is run without being asked for: read from the source.

The libraries would do both by default; these are the places where ours could let them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "rlhf_kit").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MODELS = ("AutoModel", "PreTrainedModel")
TOKENIZERS = ("AutoTokenizer", "AutoConfig")
ADAPTERS = ("PeftModel", "LoraConfig", "PeftConfig", "AutoPeft")


def problems(source: str) -> Iterator[str]:
    """Yield what a module may not do, each with its line."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {node.module or ""} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            yield from (f"{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in PICKLERS)
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                yield from (f"{node.lineno}: torch.load" for alias in node.names if alias.name == "load")
        if isinstance(node, ast.FunctionDef):
            yield from _adapter_problems(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield from _call_problems(node, ast.unparse(node.func))


def _call_problems(call: ast.Call, name: str) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    owner = name.rpartition(".")[0]
    if name in ("torch.load", "np.load", "numpy.load", "pandas.read_pickle", "torch.hub.load"):
        yield f"{call.lineno}: {name}"
    if not name.endswith(".from_pretrained"):
        return
    model, tokenizer = owner.startswith(MODELS), owner.startswith(TOKENIZERS)
    if not (model or tokenizer or owner.startswith(ADAPTERS)):
        yield f"{call.lineno}: {name} is none that this test knows"
    if model and not _is_literal(given.get("use_safetensors"), True):
        yield f"{call.lineno}: {name} without use_safetensors=True"
    if model or tokenizer:
        trust = given.get("trust_remote_code")
        if not (_is_literal(trust, False) or ast.unparse(trust or ast.Constant(None)) in TRUSTED):
            yield f"{call.lineno}: {name} with trust_remote_code {ast.unparse(trust) if trust else 'left out'}"


TRUSTED = ("base.trust_remote_code", "trust")
"""The recipe's own setting, which is true or false and never None; collate.py calls it trust."""


def _adapter_problems(function: ast.FunctionDef) -> Iterator[str]:
    """Yield PEFT's loaders that no check_adapter stands before: PEFT takes pickled weights where it finds no others."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    checks = [node.lineno for node in calls if ast.unparse(node.func) == "check_adapter"]
    for node in calls:
        name = ast.unparse(node.func)
        if name.startswith(ADAPTERS) and name.endswith(".from_pretrained") and node.lineno < min(checks, default=10**9):
            yield f"{node.lineno}: {name} without check_adapter before it"


def _is_literal(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_unpickled_or_trusted(path):
    """No unpickling call, safetensors only, and trust_remote_code said in every call. Benchmarks load only what they
    wrote themselves, or a run of this package."""
    found = list(problems(path.read_text(encoding="utf-8")))
    if path.parent.name == "benchmarks":
        found = [problem for problem in found if "torch.load" in problem or "imports" in problem]
    assert found == []


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("import pickle", 1),
        ("from dill import loads", 1),
        ("from torch import load", 1),
        ("torch.load('x')", 1),
        ("AutoModelForCausalLM.from_pretrained(x, trust_remote_code=False)", 1),
        ("AutoModelForCausalLM.from_pretrained(x, use_safetensors=None)", 2),
        ("AutoTokenizer.from_pretrained(x)", 1),
        ("AutoTokenizer.from_pretrained(x, trust_remote_code=None)", 1),
        ("AutoConfig.from_pretrained(x, trust_remote_code=True)", 1),
        ("def f():\n    PeftModel.from_pretrained(m, x)\n    check_adapter(x)", 1),
        ("Whatever.from_pretrained(x)", 1),
        ("def f():\n    check_adapter(x)\n    PeftModel.from_pretrained(m, x)", 0),
        ("AutoModelForCausalLM.from_pretrained(x, use_safetensors=True, trust_remote_code=False)", 0),
        ("AutoTokenizer.from_pretrained(x, trust_remote_code=base.trust_remote_code)", 0),
    ],
)
def test_the_rule_sees_what_it_forbids(source, number):
    """Each slip is found, and what is right is not."""
    assert len(list(problems(source))) == number, list(problems(source))
