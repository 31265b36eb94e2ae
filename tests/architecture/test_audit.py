"""`make audit`: what it asks about, and what its exit code says; a script stands in for pip-audit and its service."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

AUDITOR = """\
#!/usr/bin/env bash
printf '%s\\n' "$@" > arguments.txt
{said}
exit {code}
"""


@pytest.fixture
def project(tmp_path):
    """The files that an audit reads, and a place for the auditor."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for name in ("constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    return tmp_path


def audit(project: Path, said: str, code: int) -> subprocess.CompletedProcess[str]:
    """Run the audit with an auditor that says something and ends with a code."""
    auditor = project / ".venv" / "bin" / "pip-audit"
    auditor.write_text(AUDITOR.format(said=said, code=code))
    auditor.chmod(0o755)
    command = [str(project / ".ci" / "audit"), "torch==2.13.0 --index-url https://example.org"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_every_pinned_version_is_asked_about(project):
    """The list is that of constraints.txt and torch, each pinned, without resolving anything."""
    assert audit(project, "echo 'No known vulnerabilities found' >&2", 0).returncode == 0
    asked = (project / ".venv" / "audited.txt").read_text().splitlines()
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert asked == [*pinned, "torch==2.13.0"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in asked)
    arguments = (project / "arguments.txt").read_text().split()
    assert arguments[:2] == ["--requirement", ".venv/audited.txt"]
    assert {"--no-deps", "--disable-pip", "--strict"} <= set(arguments)


@pytest.mark.parametrize(
    ("said", "code", "told"),
    [
        ("echo 'Found 2 known vulnerabilities in 1 package' >&2; echo 'jinja2 3.1.6 GHSA-x'", 1, "jinja2 3.1.6"),
        ("echo 'ERROR:pip_audit._cli:absl-py: Dependency not found on PyPI' >&2", 2, "Not audited: the vulnerability"),
        ("echo 'ERROR:pip_audit._cli:Failed to connect' >&2", 2, "it needs the network"),
    ],
)
def test_the_exit_code_tells_vulnerable_from_not_asked(project, said, code, told):
    """1 where something is known, 2 where the service could not be asked: silence is no good news."""
    result = audit(project, said, 1)
    assert result.returncode == code and told in result.stdout + result.stderr


def test_make_hands_over_the_torch_that_it_pins():
    """The Makefile alone pins torch."""
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    environment = {name: value for name, value in os.environ.items() if name != "TORCH"}
    shown = subprocess.run(
        ["make", "-n", "audit"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert torch is not None and f".ci/audit '{torch[1]}'" in shown.stdout


def test_pip_audit_takes_these_arguments():
    """The real command line knows each of them."""
    auditor = Path(sys.executable).with_name("pip-audit")
    text = subprocess.run([str(auditor), "--help"], capture_output=True, text=True, timeout=60).stdout
    for argument in re.findall(r" (--[a-z-]+)", (ROOT / ".ci" / "audit").read_text().partition("pip-audit ")[2]):
        assert argument in text
