"""Rows as they stand in files and Hub datasets: "file:line" and the cells by column, one row after the other.

Nothing is held but the row at hand and a buffer, whatever the size of the file. Local files are read here, without
`datasets`, so that every row has its line; datasets of the Hub go through `datasets`, imported late.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rlhf_kit.data_cards import HubSource, data_suffix
from rlhf_kit.errors import InputError, did_you_mean, printable

__all__ = [
    "MAX_EXPANSION",
    "MAX_ROW",
    "Block",
    "file_rows",
    "hub_rows",
    "is_one_object",
    "json_blocks",
    "json_row",
    "short",
]

MAX_ROW = 2**24
"""Bytes of a row, some four million tokens. A .gz of 49 kB can unpack to a row that fills the memory."""
MAX_EXPANSION, FREE_EXPANSION = 200, 2**26
"""A compressed file may unpack to so many times its size; not looked at before so many bytes. Text makes 3 to 20."""

CHUNK = 2**20
BLOCK = 2**21
"""Bytes of JSON lines that are read together."""
ARROW_ROWS = 256
"""Rows of Parquet and Arrow that are made at a time."""

Cells = dict[str, Any]


def file_rows(path: Path, rows: str | None = None, *, quoted: bool = True) -> Iterator[tuple[str, Cells]]:
    """Yield "file:line" and the cells of each row of a file; with quoted=False, quotes in .csv and .tsv files are text.

    rows: the key, or the way "a.b", inside the one object of a .json file behind which the list of rows stands.

    Raises:
        InputError: it is cut off, too large, or not what its ending says; with the line.
    """
    suffix = data_suffix(path)
    assert suffix is not None  # load_card has seen to it
    match suffix.removesuffix(".gz").removesuffix(".zst"):
        case ".jsonl" | ".ndjson":
            return _jsonl_rows(path)
        case ".json":
            return _json_rows(path, rows)
        case ".csv":
            return _csv_rows(path, ",", quoted)
        case ".tsv":
            return _csv_rows(path, "\t", quoted)
        case ".txt":
            return _text_rows(path)
        case ".parquet":
            return _parquet_rows(path)
    return _arrow_rows(path)


def short(value: Any) -> str:
    """Return a value for a message, so that two different ones look different and a long one stays short."""
    if value is None:
        return "nothing (null)"
    text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------- bytes


class Reader:
    """The unpacked bytes of a file, and how far it was read."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self.file, self.line, self.unpacked = path, file, 0, 0
        self.most = max(FREE_EXPANSION, MAX_EXPANSION * path.stat().st_size)

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size` of them."""
        return self._counted(self.file.read(size))

    def readline(self) -> bytes:
        """Return the next line."""
        line = self._counted(self.file.readline(MAX_ROW + 1))
        self.line += bool(line)
        if len(line) > MAX_ROW:
            raise InputError(f"{self.path}:{self.line}: the line is longer than {MAX_ROW:,} bytes")
        return line

    def _counted(self, data: bytes) -> bytes:
        self.unpacked += len(data)
        if self.unpacked > self.most:
            raise InputError(
                f"{self.path}:{self.line + 1}: unpacks to more than {MAX_EXPANSION} times its size, as no text "
                "does; unpack it yourself if it is sound"
            )
        return data


@contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """Open a file of text, unpacking it; what is wrong with it inside becomes an InputError."""
    reader: Reader | None = None
    try:
        with _unpacking(path) as file:
            reader = Reader(path, file)
            yield reader
    except EOFError:
        raise InputError(f"{path}:{_next(reader)}: the compressed file is cut off here; get it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        if isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in str(error) and _next(reader) == 1:
            raise InputError(f"{path}: is not compressed, whatever its name says; take .gz off the name") from None
        raise InputError(f"{path}:{_next(reader)}: not a sound gzip file: {error}; get it again") from None
    except OSError as error:
        if path.name.lower().endswith(".zst") and error.strerror is None:
            raise InputError(f"{path}:{_next(reader)}: not a sound zstd file: {error}; get it again") from None
        raise InputError(f"{path}:{_next(reader)}: cannot be read: {error.strerror or error}") from None


def _next(reader: Reader | None) -> int:
    return 1 if reader is None else reader.line + 1


def _unpacking(path: Path) -> Any:  # a file of bytes, of one of three classes
    if path.name.lower().endswith(".gz"):
        return gzip.open(path)
    if path.name.lower().endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), CHUNK)
    return path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    with opened(path) as reader:
        for line in iter(reader.readline, b""):
            yield _decoded(path, reader.line, line)


def _decoded(path: Path, number: int, line: bytes) -> str:
    if number == 1:
        _refuse_utf16(path, line)
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(_not_utf8(path, number, error.start + 1, line[error.start])) from None


def _refuse_utf16(path: Path, beginning: bytes) -> None:
    """Raise InputError if a file begins as UTF-16 does: with its byte order mark, or with zero bytes among letters."""
    mark = {codecs.BOM_UTF16_LE: "UTF-16LE", codecs.BOM_UTF16_BE: "UTF-16BE"}.get(beginning[:2])
    zeros = [beginning[start:200:2].count(0) > len(beginning[:200]) / 8 for start in (0, 1)]
    looks = mark or {(True, False): "UTF-16BE", (False, True): "UTF-16LE"}.get((zeros[0], zeros[1]))
    if looks:
        sign = f"its byte order mark is 0x{beginning[:2].hex().upper()}" if mark else "every other byte is zero"
        name = "UTF-16" if mark else looks
        raise InputError(f"{path}:1: looks like {looks} ({sign}), and not like UTF-8; {_iconv(name, path)}")


def _not_utf8(path: Path, line: int, at: int, byte: int) -> str:
    mend = _iconv("WINDOWS-1252", path)
    return f"{path}:{line}: byte {at} of the line is not UTF-8 text, but 0x{byte:02X}; if it is Windows-1252, {mend}"


def _iconv(encoding: str, path: Path) -> str:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    return f"make it UTF-8: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}"


# ---------------------------------------------------------------- JSON


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Cells]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield (where := f"{path}:{number}"), json_row(line, where)


@dataclass(frozen=True)
class Block:
    """Some lines of a file of JSON lines, and their columns if every line has all of these as text."""

    path: Path
    first_line: int
    data: bytes
    columns: dict[str, Any] | None
    """A pyarrow.StringArray for each name."""

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield "file:line" and the line, for those that are not empty."""
        for number, line in enumerate(self.data.splitlines(keepends=True), start=self.first_line):
            if line.strip():
                yield f"{self.path}:{number}", _decoded(self.path, number, line)


def json_blocks(path: Path, names: Sequence[str]) -> Iterator[Block]:
    """Yield a file of JSON lines in blocks, their columns read by pyarrow a block ahead: six times as fast as by rows.

    Raises:
        InputError: the file cannot be read to its end. Lines that are not JSON are in a block without columns.
    """
    with opened(path) as reader, ThreadPoolExecutor(1) as ahead:
        waiting: Future[Block] | None = None
        while data := reader.read(BLOCK):
            first_line = reader.line + 1
            lines = data.count(b"\n")
            reader.line += lines
            if not data.endswith(b"\n"):
                data += reader.readline()
                lines += 1
            parsed = ahead.submit(_block, path, first_line, lines, data, tuple(names))
            if waiting is not None:
                yield waiting.result()
            waiting = parsed
        if waiting is not None:
            yield waiting.result()


def _block(path: Path, first_line: int, lines: int, data: bytes, names: Sequence[str]) -> Block:
    import pyarrow
    import pyarrow.json

    unread = Block(path, first_line, data, None)
    try:
        table = pyarrow.json.read_json(
            pyarrow.BufferReader(data),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            pyarrow.json.ParseOptions(
                explicit_schema=pyarrow.schema([(name, pyarrow.string()) for name in names]),
                unexpected_field_behavior="ignore",
            ),
        )
        table.validate(full=True)
    except pyarrow.ArrowException:
        return unread
    columns = {name: table.column(name).combine_chunks() for name in names}
    if table.num_rows != lines or any(column.null_count for column in columns.values()):
        return unread
    return Block(path, first_line, data, columns)


def json_row(line: str, where: str) -> Cells:
    """Return the object that a line of JSON is.

    Raises:
        InputError: it is not one.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if where.endswith(":1") and line.strip() == "[":
            raise InputError(f"{where}: is a JSON list and not JSON lines; let its name end in .json") from None
        cut = "" if line.endswith("\n") else "; is the file cut off here?"
        raise InputError(f"{where}: not a line of JSON: {_json_error(error)}{cut}") from None
    return _object(row, where)


_SPACE = re.compile(r"[\s,]*")


def is_one_object(path: Path) -> bool:
    """Return whether a file is one JSON object and neither a list nor lines."""
    if not path.is_file() or data_suffix(path) not in (".json", ".json.gz", ".json.zst"):
        return False
    with opened(path) as reader:
        text = _Window(reader)
        text.skip(re.compile(r"\s*"))
        if not text.starts("{"):
            return False
    return len(list(islice(_json_rows(path), 2))) == 1


def _enter(text: _Window, decoder: json.JSONDecoder, key: str) -> None:
    """Go to the value behind a key of the object that begins here."""
    at = f"{text.reader.path}:{text.line}"
    if not text.starts("{"):
        raise InputError(f"{at}: there is no object here that has a key {key}, which the card's rows: names")
    text.advance(1)
    passed = _pass(text, decoder, key)
    if passed is not None:
        hint = did_you_mean(key, passed)
        raise InputError(f"{at}: there is no key {key} here, which the card's rows: names{hint}")


def _pass(text: _Window, decoder: json.JSONDecoder, until: str | None = None) -> list[str] | None:
    """Go on to the value behind a key of the object at hand; or behind its end, and return the keys on the way."""
    passed: list[str] = []
    while True:
        text.skip(_SPACE)
        if not text.rest():
            raise InputError(f"{text.reader.path}:{text.line}: the object has no end; is the file cut off here?")
        if text.starts("}"):
            text.advance(1)
            return passed
        name = text.decode(decoder)
        text.skip(re.compile(r"[\s:]*"))
        if name == until:
            return None
        passed.append(str(name))
        text.decode(decoder)


def _json_rows(path: Path, rows: str | None = None) -> Iterator[tuple[str, Cells]]:
    """Yield the objects of a JSON list; or of a file with one object after another, as some .json files are."""
    decoder = json.JSONDecoder()
    with opened(path) as reader:
        text = _Window(reader)
        text.skip(re.compile(r"\s*"))
        keys = [] if rows is None else rows.split(".")
        for key in keys:
            _enter(text, decoder, key)
        is_list = text.starts("[")
        if rows is not None and not is_list:
            raise InputError(f"{path}:{text.line}: there is no list behind {rows}, which the card's rows: names")
        if is_list:
            text.advance(1)
        text.skip(_SPACE)
        before, element = 0, 1  # of rows that stand on one line, the second and later have a number
        while text.rest() and not (is_list and text.starts("]")):
            element = element + 1 if text.line == before else 1
            before = text.line
            where = f"{path}:{text.line}{f'#{element}' if element > 1 else ''}"
            yield where, _object(text.decode(decoder), where)
            text.skip(_SPACE)
        if is_list and not text.rest():
            raise InputError(f"{path}:{text.line}: the list has no end; is the file cut off here?")
        if is_list:
            text.advance(1)
            for _ in keys:
                _pass(text, decoder)
            text.skip(re.compile(r"\s*"))
            if text.rest():
                raise InputError(
                    f"{path}:{text.line}: there is more behind the end of the {'object' if keys else 'list'}"
                )


class _Window:
    """The part of a long text that is being looked at; `line` is where it begins."""

    def __init__(self, reader: Reader):
        self.reader, self.line, self.text, self.at = reader, 1, "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.begun = self.ended = False

    def more(self, size: int) -> None:
        """Read on; what was passed is let go."""
        self.text, self.at = self.text[self.at :], 0
        data = self.reader.read(size)
        self.ended = not data
        if not self.begun:
            _refuse_utf16(self.reader.path, data)
            self.begun = True
        try:
            self.text += self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            before = self.text + error.object[: error.start].decode("utf-8", "replace")
            number, column = self.line + before.count("\n"), len(before.rpartition("\n")[2].encode()) + 1
            raise InputError(_not_utf8(self.reader.path, number, column, error.object[error.start])) from None

    def rest(self) -> bool:
        """Return whether anything is left."""
        while self.at == len(self.text) and not self.ended:
            self.more(CHUNK)
        return self.at < len(self.text)

    def starts(self, letter: str) -> bool:
        return self.rest() and self.text[self.at] == letter

    def advance(self, to: int) -> None:
        """Go on by so many characters."""
        self.line += self.text.count("\n", self.at, self.at + to)
        self.at += to
        self.reader.line = self.line - 1  # what cannot be unpacked is on the line at hand

    def skip(self, pattern: re.Pattern[str]) -> None:
        while self.rest():
            found = pattern.match(self.text, self.at)
            assert found is not None  # the patterns match nothing too
            self.advance(found.end() - self.at)
            if self.at < len(self.text):
                return

    def decode(self, decoder: json.JSONDecoder) -> Any:
        """Return the value that begins here, reading on as far as it goes."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                if not self.ended and len(self.text) - self.at <= MAX_ROW and not isinstance(error, RecursionError):
                    self.more(max(CHUNK, len(self.text) - self.at))
                    continue
                at = error.pos if isinstance(error, json.JSONDecodeError) else self.at
                number = self.line + self.text.count("\n", self.at, at)
                if len(self.text) - self.at > MAX_ROW and not self.ended:
                    raise InputError(
                        f"{self.reader.path}:{self.line}: not JSON, or a row longer than {MAX_ROW:,} bytes: "
                        f"{_json_error(error)} (line {number})"
                    ) from None
                raise InputError(f"{self.reader.path}:{number}: not JSON: {_json_error(error)}") from None
            if end == len(self.text) and not self.ended:  # a number may go on
                self.more(CHUNK)
                continue
            if end - self.at > MAX_ROW:
                raise InputError(f"{self.reader.path}:{self.line}: the row is longer than {MAX_ROW:,} bytes")
            self.advance(end - self.at)
            return value


def _json_error(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))


def _object(row: Any, where: str) -> Cells:
    if not isinstance(row, dict):
        raise InputError(f'{where}: a row is an object such as {{"prompt": "..."}}; seen {short(row)}')
    return row


# ---------------------------------------------------------------- tables


def _csv_rows(path: Path, delimiter: str, quoted: bool) -> Iterator[tuple[str, Cells]]:
    csv.field_size_limit(MAX_ROW)
    reader = csv.reader(
        _lines(path), delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    )
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                twice = [name for name, number in Counter(header).items() if number > 1]
                if "" in twice:
                    raise InputError(f"{where}: {header.count('')} columns have no name; name or remove them")
                if twice:
                    raise InputError(printable(f"{where}: the header names column {twice[0]} twice"))
            elif len(cells) != len(header):
                raise InputError(
                    f"{where}: {len(cells)} cells under a header of {len(header)}; quote cells with {delimiter!r}"
                )
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        way = " Where quotes are text, a card says quoting: none" * quoted
        raise InputError(f"{path}:{line}: not CSV: {error}; is a quote not closed, or the file cut off?{way}") from None


def _text_rows(path: Path) -> Iterator[tuple[str, Cells]]:
    """Yield each line that is not empty as a column `text`."""
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield f"{path}:{number}", {"text": line.rstrip("\r\n")}


def _parquet_rows(path: Path) -> Iterator[tuple[str, Cells]]:
    import pyarrow
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=ARROW_ROWS)

    return _table_rows(path, batches(), "Parquet")


def _arrow_rows(path: Path) -> Iterator[tuple[str, Cells]]:
    """Yield rows of Arrow's file format (also .feather) and of its stream format, which `datasets` writes."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                file.seek(0)
                whole = pyarrow.ipc.open_file(file)
                found = (whole.get_batch(number) for number in range(whole.num_record_batches))
            else:
                file.seek(0)
                found = iter(pyarrow.ipc.open_stream(file))
            for batch in found:
                batch.validate(full=True)
                for start in range(0, batch.num_rows, ARROW_ROWS):
                    yield batch.slice(start, ARROW_ROWS)

    return _table_rows(path, batches(), "Arrow")


def _table_rows(path: Path, batches: Iterator[Any], what: str) -> Iterator[tuple[str, Cells]]:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            if batch.nbytes > MAX_ROW:
                for row in range(batch.num_rows):
                    if batch.slice(row, 1).nbytes > MAX_ROW:
                        raise InputError(f"{path}:{number + row + 1}: the row is longer than {MAX_ROW:,} bytes")
            for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}:{number + 1}: not a sound {what} file: {said}; get it again") from None


def hub_rows(source: HubSource) -> Iterator[tuple[str, Cells]]:
    """Yield "dataset:number" and the cells of each row of a Hub dataset.

    Raises:
        InputError: it cannot be had.
    """
    import datasets

    try:
        data = datasets.load_dataset(
            f"hf://datasets/{source.repo}",  # a folder of that name here is another thing
            source.config,
            data_dir=source.data_dir,
            data_files=list(source.data_files) if isinstance(source.data_files, tuple) else source.data_files,
            split=source.split,
            revision=source.revision,
            **({"streaming": True} if source.streaming else {}),
        )
        _check_revision(source, data)
        for number, row in enumerate(data, start=1):
            yield f"{source}:{number}", row
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        offline = any(sign in said for sign in ("Offline", "Couldn't reach", "LocalEntryNotFound"))
        way = "; go online (and unset HF_HUB_OFFLINE), or name files in source:" if offline else ""
        raise InputError(f"{source}: cannot be had from the Hub: {said}{way}") from error


def _check_revision(source: HubSource, data: Any) -> None:
    """Refuse rows of another revision: without the Hub, `datasets` takes the newest it has of a name, unasked.

    The folder that holds the rows is called as their commit; the Hub's cache notes which commit a revision was.
    """
    files = getattr(data, "cache_files", None)
    if not files:
        return
    from huggingface_hub import constants

    commit = Path(files[0]["filename"]).parent.name
    note = Path(constants.HF_HUB_CACHE) / f"datasets--{source.repo.replace('/', '--')}" / "refs" / source.revision
    wanted = note.read_text(encoding="utf-8").strip() if note.is_file() else source.revision
    if commit != wanted:
        raise InputError(
            f"{source}: the Hub is not reached, and what is kept of it here is another revision (commit "
            f"{commit[:12]}); go online, or pin the revision that is here."
        )
