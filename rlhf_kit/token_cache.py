"""Tokenised rows kept from one run to the next, so that a second run over the same data starts in seconds.

They lie in the user's cache folder (`$XDG_CACHE_HOME/rlhf_kit/tokens`, else `~/.cache/...`), each under the hash of all
that they depend on: the rows, the tokenizer with its template, the limit and what becomes of longer rows, and the code.
Entries are looked at again by their own hash; one that is damaged counts as missing. When together they are larger than
MOST_BYTES, those used longest ago are removed. The folder can be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import tokenizers
import transformers

from rlhf_kit import collate
from rlhf_kit.collate import TextFormat, Tokenised

__all__ = ["tokenised"]

FEWEST_ROWS = 1000
"""Fewer are tokenised in less than a second."""
MOST_BYTES = 2**30


def tokenised(
    tokenise: Callable[..., Tokenised], rows: Sequence[Any], text_format: TextFormat, *settings: Any
) -> Tokenised:
    """Return what a function of `collate` makes of the rows, from an earlier run if it is there.

    settings: the function's further arguments: the limit, what becomes of longer rows, ...

    Raises: as the function; what it raises is not kept.
    """
    if len(rows) < FEWEST_ROWS:
        return tokenise(rows, text_format, *settings)
    entry = folder() / f"{_key(tokenise, rows, text_format, *settings)}.arrow"
    found = _read(entry)
    if found is None:
        found = tokenise(rows, text_format, *settings)
        with suppress(OSError):  # a full disk or a home that cannot be written to costs time and nothing else
            _write(entry, found)
            _make_room(entry)
    return found


def folder() -> Path:
    """Return the folder of the entries."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "rlhf_kit" / "tokens"


def _key(tokenise: Callable[..., Tokenised], rows: Sequence[Any], text_format: TextFormat, *settings: Any) -> str:
    digest = hashlib.sha256()
    code = Path(collate.__file__).read_bytes()
    versions = [transformers.__version__, tokenizers.__version__, getattr(tokenise, "__name__", "")]
    about = [text_format.identity(), text_format.start_ids, *versions, *settings]
    digest.update(code + json.dumps(about, sort_keys=True).encode())
    for row in rows:
        digest.update(type(row).__name__.encode())
        digest.update(json.dumps({**vars(row), "where": ""}, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _read(entry: Path) -> Tokenised | None:
    """Return an entry, or None if it is missing or damaged."""
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    with suppress(OSError):
        os.utime(entry)  # for the order in which entries are removed
    return _decoded(content[32:])


def _write(entry: Path, found: Tokenised) -> None:
    content = _encoded(found)
    if content is None or _decoded(content) != found:  # a kind of row that does not come back as it was
        return
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, delete=False) as file:
        try:
            file.write(hashlib.sha256(content).digest() + content)
            file.close()
            os.replace(file.name, entry)
        except OSError:
            os.unlink(file.name)
            raise


def _encoded(found: Tokenised) -> bytes | None:
    try:
        table = pyarrow.table({"row": pyarrow.array(found.rows)})
    except (pyarrow.ArrowException, OverflowError):
        return None
    about = {"counts": json.dumps(found.counts), "kept": json.dumps(found.kept)}
    sink = pyarrow.BufferOutputStream()
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_file(sink, table.schema.with_metadata(about), options=options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _decoded(content: bytes) -> Tokenised:
    table = pyarrow.ipc.open_file(pyarrow.BufferReader(content)).read_all()
    about = table.schema.metadata
    return Tokenised(table.column("row").to_pylist(), json.loads(about[b"counts"]), json.loads(about[b"kept"]))


def _make_room(newest: Path) -> None:
    """Remove the entries that were used longest ago, so that all together have at most MOST_BYTES."""
    entries = sorted(newest.parent.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    size = 0
    for entry in entries:
        size += entry.stat().st_size
        if size > MOST_BYTES and entry != newest:
            entry.unlink(missing_ok=True)
