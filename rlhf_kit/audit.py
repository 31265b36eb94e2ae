"""What a person should know of a card's data before training on it: `rlhf-kit data check`.

Rows flow through once. Of each 43 bytes are kept in a temporary file, hashes and where it stood, from which repetitions
are told at the end; everything else is counted on the way. So memory does not grow with the data, except for rankings
whose completions have a row each. `row_batches` has how rows come, `sketches` how repetitions are told, `audit_words`
how what was found is written.
"""

from __future__ import annotations

import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from rlhf_kit import sketches
from rlhf_kit.data_cards import DataCard
from rlhf_kit.examples.book import OVER_LINES, SHOWN, Book
from rlhf_kit.examples.rows import Prompt, Ranking, Text, probability_of, refusal
from rlhf_kit.maths.statistics import krippendorff_alpha
from rlhf_kit.memory import keep_freed_memory
from rlhf_kit.row_batches import Batch, batches

__all__ = ["Audit", "Measured", "audit"]

SAMPLED = 64
"""One row in so many is tokenised to say how long rows are; every one that may be too long is."""

ROW = np.dtype([
    ("row", "u8"), ("prompt", "u8"), ("near0", "u8"), ("near1", "u8"),
    ("line", "u4"), ("element", "u4"), ("file", "u2"), ("side", "u1"),
])  # fmt: skip
PAIR = np.dtype([("pair", "u8"), ("row", "u4"), ("vote", "u1"), ("longer", "u1"), ("who", "u4")])
"""A judgement on two completions: vote 0 and 1 are for either of them whichever way they were shown, 2 is a tie; which
of them is the longer one, likewise; and who judged, 0 where nobody is named."""

MARKERS = re.compile(
    r"<\|[A-Za-z_0-9 ]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(start|end)_of_turn>|<\|?(eos|bos|pad|unk)\|?>"
    r"|\[(CLS|SEP|PAD|MASK|UNK)\]|<｜[^｜]{1,40}｜>"
)
"""What chat templates and tokenizers write, and texts should not."""
NO_VALUE = frozenset(("nan", "NaN", "None", "NULL", "null", "N/A", "#N/A", "<NA>"))
"""What programs write where there is nothing."""
ODD = {
    "control characters": "\x80-\x9f",
    "zero-width or direction marks": "\u200b\u200c\u200d\u2060\u200e\u200f\u202a\u202b\u202c\u202d\u202e\ufeff",
    "replacement characters": "\ufffd",
}
STRUCTURED = "a list or object of JSON as a text"
NOTHING = "a text that only says that there is nothing, such as nan or N/A"
WAYS = {
    STRUCTURED: "; column[:] reads a list in a cell, column[0] its first element",
    OVER_LINES: "; where quotes are text there, write quoting: none",
}
"""What a card can do about suspicious rows."""


@dataclass(frozen=True)
class Measured:
    """How a base's tokens are counted."""

    name: str
    context: int | None
    room: Callable[[int, int], bool]
    """Whether a row of so many bytes in so many messages may be too long."""
    count: Callable[[Prompt, list[str]], tuple[int, list[int]]]
    """Tokens of the prompt, and of each completion behind it."""
    spells_special: Callable[[str], bool] = lambda text: False
    """Whether a text holds the name of a special token."""


@dataclass
class Audit:
    """What was found, as `rlhf-kit data check --json` writes it."""

    card: str
    kind: str
    rows: dict[str, Any] = field(default_factory=dict)
    duplicates: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    scripts: dict[str, float] = field(default_factory=dict)
    suspicious: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What keeps the card from being used as it is."""


def audit(card: DataCard, measured: Measured | None = None) -> Audit:
    """Return what there is to say about a card's data.

    Raises:
        InputError: a file cannot be read to its end, or a column is not there.
    """
    keep_freed_memory()
    sources = [card.sources] if isinstance(card.heldout, float) else [card.sources, card.heldout]
    with _Looking(card, measured) as looking, ThreadPoolExecutor(1) as beside:
        before: Future[None] | None = None
        for side, source in enumerate(sources):
            for batch in batches(card, source, looking.book):  # NumPy looks at one while the next one is read
                if before is not None:
                    before.result()
                before = beside.submit(looking.at, batch, side)
        if before is not None:
            before.result()
        return looking.found()


# ---------------------------------------------------------------- looking at them


class _Looking:
    """The books of an audit while rows flow by."""

    def __init__(self, card: DataCard, measured: Measured | None):
        self.card, self.measured = card, measured
        self.book = Book()
        self.files: dict[str, int] = {}
        self.count = 0
        self.on_side = [0, 0]
        self.characters: Counter[str] = Counter()
        self.letters = np.zeros(0x110000, dtype=np.int64)
        self.longer = Counter[str]()
        self.ties = 0
        self.best_at: Counter[int] = Counter()
        self.annotators: Counter[str] = Counter()
        self.odd: dict[str, list[Any]] = {}
        self.tokens: list[int] = []
        self.too_long: Counter[str] = Counter()
        self.too_long_shown: list[str] = []
        self.refused: list[str] = []

    def __enter__(self) -> _Looking:
        self.rows, self.pairs = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        return self

    def __exit__(self, *_: object) -> None:
        self.rows.close()
        self.pairs.close()

    def at(self, batch: Batch, side: int) -> None:
        """Look at some rows."""
        size = len(batch.keys)
        records = np.zeros(size, ROW)
        records["line"], records["element"] = batch.line, batch.element
        records["file"] = np.array([self.files.setdefault(file, len(self.files)) for file in batch.files])[batch.file]
        records["side"] = side
        prompts = sketches.hashes(batch.keys)
        records["prompt"] = prompts
        records["row"] = sum((sketches.mixed(hashes, place) for place, hashes in enumerate([prompts, *batch.hashes])))
        who = np.zeros(size, np.uint64)
        if batch.who is not None and any(name is not None for name in batch.who):
            named = np.array([name is not None for name in batch.who])
            who[named] = sketches.mixed(sketches.hashes([str(name) for name in batch.who]), 9)[named]
            self.annotators.update(name for name in batch.who if name is not None)
        if self.card.votes is None:
            records["row"] += who  # two people's equal judgements are no repetition
        else:  # votes on one pair are put together, whichever way they went
            records["row"] = self._pairs_of(prompts, batch)
        lengths = [np.fromiter(map(len, column), np.int64, size) for column in [batch.prompts, *batch.answers]]
        data, offsets = sketches.laid_out([batch.prompts, *batch.answers], lengths)
        self._look_at_bytes(batch, data, offsets, records)
        if self.card.kind != "text":
            self._look_at_whole_texts(batch, records)
        least = sketches.least(data, offsets)
        bands = sketches.mixed(least.astype(np.uint64), 0).reshape(sketches.BANDS, -1, size)
        for band in range(sketches.BANDS):
            hashed = np.zeros(size, np.uint64)
            for row in bands[band]:
                hashed = hashed * np.uint64(0x100000001B3) ^ row
            records[f"near{band}"] = hashed
        self._look_at_labels(batch, prompts, lengths, who)
        if self.measured is not None:
            self._look_at_tokens(batch, records)
            if self.card.special_tokens == "refuse":
                spells = self.measured.spells_special
                columns = [batch.prompts, *batch.answers]
                rows = [row for row in range(size) if any(spells(column[row]) for column in columns)]
                self.refused += [self._place(records[row]) for row in rows]
        records.tofile(self.rows)
        self.count += size
        self.on_side[side] += size

    def _look_at_bytes(self, batch: Batch, data: np.ndarray, offsets: np.ndarray, records: np.ndarray) -> None:
        """Count letters, and note rows with characters or words that do not belong into text."""
        self.letters[ord("a")] += np.count_nonzero(((data | 32) - np.uint8(97)) < 26)
        low = np.flatnonzero((data < 32) | (data == 127))
        if len(odd := low[_CONTROL[data[low]]]):
            self._note("control characters", _rows_at(odd, offsets), records)
        if data.max() >= 128:
            letters = np.frombuffer(data[data >= 128].tobytes().decode().encode("utf-32-le"), np.uint32)
            counts = np.bincount(letters, minlength=0x110000)
            self.letters += counts
            for what, characters in ODD.items():
                if counts[_numbers(characters)].any():
                    self._note(what, _matching(re.compile(f"[{characters}]"), batch, range(len(records))), records)
        brackets = np.flatnonzero((data == ord("<")) | (data == ord("[")))
        if len(brackets):
            rows = np.unique(_rows_at(brackets, offsets))
            self._note("template tokens", _matching(MARKERS, batch, rows.tolist()), records)

    def _look_at_whole_texts(self, batch: Batch, records: np.ndarray) -> None:
        """Note rows with a text that is a cell misread: a structure, or a word for nothing."""
        answers = [text for column in batch.answers for text in enumerate(column)]
        if self.card.kind == "rankings":  # whose completions are one text in answers
            rankings = [(row, ranking) for row, ranking in enumerate(batch.rows or ()) if isinstance(ranking, Ranking)]
            answers = [(row, text) for row, ranking in rankings for text in ranking.completions]
        texts = [*enumerate(batch.prompts), *answers]
        structured = [row for row, text in texts if text.startswith(("[", "{")) and _is_structured(text)]
        nothing = [row for row, text in texts if len(text) < 8 and text.strip() in NO_VALUE]
        self._note(STRUCTURED, np.array(structured, int), records)
        self._note(NOTHING, np.array(nothing, int), records)

    def _note(self, what: str, rows: np.ndarray, records: np.ndarray) -> None:
        rows = np.unique(rows)
        if len(rows):
            note = self.odd.setdefault(what, [0, []])
            note[0] += len(rows)
            note[1] += [self._place(records[row]) for row in rows[: SHOWN - len(note[1])]]

    def _place(self, record: Any) -> str:
        names = list(self.files)
        element = int(record["element"])
        return f"{names[int(record['file'])]}:{int(record['line'])}{f'#{element}' if element else ''}"

    def _look_at_labels(
        self, batch: Batch, prompts: np.ndarray, lengths: Sequence[np.ndarray], who: np.ndarray
    ) -> None:
        if self.card.kind == "preferences":
            chosen, rejected = batch.hashes
            pairs = np.zeros(len(prompts), PAIR)
            pairs["pair"] = self._pairs_of(prompts, batch)
            pairs["row"] = np.arange(self.count, self.count + len(prompts))
            pairs["vote"] = chosen < rejected
            self.characters.update(chosen=int(lengths[1].sum()), rejected=int(lengths[2].sum()))
            difference = lengths[1] - lengths[2]
            pairs["longer"] = np.where(difference == 0, 2, (chosen < rejected) == (difference > 0))
            if batch.rows is not None:
                tied = np.array([probability_of(row) == 0.5 for row in batch.rows])  # type: ignore[arg-type]
                pairs["vote"][tied] = 2
            pairs["who"] = who
            self._count_judged(pairs)
            pairs.tofile(self.pairs)
        elif self.card.kind == "rankings":
            self._look_at_rankings(batch.rows or ())
        elif batch.answers:
            self.characters["text" if self.card.kind == "text" else "completion"] += int(lengths[1].sum())
        if self.card.kind != "text":
            self.characters["prompt"] += int(lengths[0].sum())

    @staticmethod
    def _pairs_of(prompts: np.ndarray, batch: Batch) -> np.ndarray:
        """Return hashes that are equal for the same two completions of a prompt, in either order."""
        chosen, rejected = batch.hashes
        return sketches.mixed(prompts, 0) + sketches.mixed(chosen, 1) + sketches.mixed(rejected, 1)

    def _count_judged(self, pairs: np.ndarray, sign: int = 1) -> None:
        """Add judgements to (or, with sign -1, take them from) the ties and what "longer wins" would score."""
        tied, equal = pairs["vote"] == 2, pairs["longer"] == 2
        self.ties += sign * int(tied.sum())
        self.longer["pairs"] += sign * int((~tied).sum())
        self.longer["equal"] += sign * int((~tied & equal).sum())
        self.longer["longer"] += sign * int((~tied & (pairs["longer"] == pairs["vote"])).sum())

    def _look_at_rankings(self, rows: Iterable[Any]) -> None:
        found = []
        for number, row in enumerate(rows, start=self.count):
            self.best_at.update(place for place, rank in enumerate(row.ranks, start=1) if rank == min(row.ranks))
            self.characters["completion"] += sum(map(len, row.completions))
            self.characters["completions"] += len(row.completions)
            prompt = hash(json.dumps(row.prompt))
            for one, other in combinations(range(len(row.completions)), 2):
                texts, ranks = row.completions, row.ranks
                first, second = hash(texts[one]), hash(texts[other])
                vote = 2 if ranks[one] == ranks[other] else int((ranks[one] < ranks[other]) == (first < second))
                difference = len(texts[one]) - len(texts[other])
                longer = 2 if difference == 0 else int((difference > 0) == (first < second))
                pair = (hash((prompt, min(first, second), max(first, second)))) & (2**64 - 1)
                who = 0 if row.annotator is None else hash(row.annotator) & (2**32 - 1)
                found.append((pair, number, vote, longer, who))
        pairs = np.array(found, PAIR)
        pairs.tofile(self.pairs)
        self._count_judged(pairs)

    def _look_at_tokens(self, batch: Batch, records: np.ndarray) -> None:
        """Count the tokens of a sample of the rows, and of every row that may be too long."""
        assert self.measured is not None
        for at in range(len(batch.keys)):
            row = batch.rows[at] if batch.rows is not None else None
            prompt: Prompt = batch.prompts[at] if row is None or isinstance(row, Text) else row.prompt
            texts = row.completions if isinstance(row, Ranking) else [column[at] for column in batch.answers]
            size = len(batch.prompts[at].encode()) + max((len(text.encode()) for text in texts), default=0)
            sampled = self.count + at < 4 * SAMPLED or (self.count + at) % SAMPLED == 0
            messages = 1 if isinstance(prompt, str) else len(prompt)
            if not sampled and not self.measured.room(size, messages):
                continue
            before, lengths = self.measured.count(prompt, texts)
            whole = before + max(lengths, default=0)
            if sampled and len(self.tokens) < 100_000:
                self.tokens.append(whole)
            context = self.measured.context
            if context is not None and whole > context:
                self.too_long["rows"] += 1
                self.too_long["tokens"] += whole - context
                self.too_long["completion alone"] += max(lengths, default=0) > context
                if len(self.too_long_shown) < SHOWN:
                    self.too_long_shown.append(f"{self._place(records[at])} ({whole:,} tokens)")

    # ------------------------------------------------------------ what was found

    def found(self) -> Audit:
        """Return the figures; where no row is left, only what became of them."""
        card, book = self.card, self.book
        result = Audit(str(card.path), card.kind)
        result.rows = {
            "read": book.read,
            "kept": self.count,
            "dropped": {
                reason: {"rows": number, "examples": book.shown.get(reason, [])}
                for reason, number in book.dropped.items()
            },
            "merged": dict(book.merged),
            "noted": {what: number for what, number in book.noted.items() if number},
        }
        if book.broken and card.on_problem == "error":
            result.problems += book.problems(card)
        if self.refused:
            result.problems.append(f"{card.path}: {refusal(self.refused, self.count)}")
        if not self.count:
            what = f"no row is left of {book.read:,} read{book.wanted(card)}"
            result.problems = result.problems or [f"{card.path}: {what}"]
            return result
        self._tell_duplicates(result)
        self._tell_prompts(result)
        if card.kind in ("preferences", "rankings"):
            self._tell_labels(result)
        self._tell_merged(result)
        self._tell_lengths(result)
        self._tell_tokens(result)
        result.scripts = _scripts(self.letters)
        result.suspicious = {what: {"rows": rows, "examples": shown} for what, (rows, shown) in self.odd.items()}
        if book.over_lines:
            result.suspicious[OVER_LINES] = {"rows": book.over_lines, "examples": book.shown[OVER_LINES]}
        result.warnings = list(_warnings(result))
        return result

    def _tell_duplicates(self, result: Audit) -> None:
        repeated = np.zeros(self.count, bool)
        shown: list[list[int]] = []
        for rows, _, starts in sketches.repeated(self.rows, ROW, "row"):
            repeated[sketches.later(rows, starts)] = True
            shown += sketches.examples(rows, starts, SHOWN - len(shown))
        near = np.zeros(self.count, bool)
        near_shown: list[list[int]] = []
        for band in range(sketches.BANDS):
            for rows, records, _ in sketches.repeated(self.rows, ROW, f"near{band}"):
                once = ~repeated[rows]
                rows, starts = rows[once], sketches.starts(records[f"near{band}"][once])
                near[sketches.later(rows, starts)] = True
                near_shown += sketches.examples(rows, starts, SHOWN - len(near_shown))
        votes = self.card.votes is not None  # on one pair: counted as put together, not as repetitions
        result.duplicates = {
            "of_rows": self.count - int(repeated.sum()) * votes,
            "exact": {"rows": 0 if votes else int(repeated.sum()), "examples": [] if votes else self._places(shown)},
            "near": {"rows": int(near.sum()), "examples": self._places(near_shown)},
        }

    def _tell_prompts(self, result: Audit) -> None:
        card = self.card
        if card.kind != "text":
            unique, shared = self.count, 0
            shown: list[list[int]] = []
            for rows, records, starts in sketches.repeated(self.rows, ROW, "prompt"):
                unique -= len(rows) - len(starts)
                sides = records["side"]
                both = np.flatnonzero(
                    (np.minimum.reduceat(sides, starts) == 0) & (np.maximum.reduceat(sides, starts) == 1)
                )
                ends = np.append(starts[1:], len(rows))
                for group in both:
                    inside = slice(starts[group], ends[group])
                    shared += int((sides[inside] == 0).sum())
                    if len(shown) < SHOWN:
                        shown.append([int(rows[inside][sides[inside] == side][0]) for side in (0, 1)])
            result.prompts = {"distinct": unique}
            if not isinstance(card.heldout, float):
                places = self._places(shown)
                result.prompts["shared_between_splits"] = {"rows": shared, "examples": places}
                if shared and card.shared_prompts == "error":
                    result.problems += [f"{one}: the prompt is also held out, in {other}" for one, other in places]
                    result.problems.append(
                        f"{card.path}: {shared:,} rows to train on have prompts that are also held out; take them out "
                        "of one, or write shared_prompts: drop"
                    )
        result.prompts["heldout"] = card.heldout if isinstance(card.heldout, float) else self.on_side[1]

    def _tell_labels(self, result: Audit) -> None:
        pairs, judged_twice, conflicting = self.pairs.tell() // PAIR.itemsize, 0, 0
        shown: list[list[int]] = []
        judged: list[np.ndarray] = []
        for _, records, starts in sketches.repeated(self.pairs, PAIR, "pair"):
            ends = np.append(starts[1:], len(records))
            counts = np.stack(
                [np.add.reduceat((records["vote"] == vote).astype(np.int64), starts) for vote in range(3)], axis=1
            )
            pairs -= len(records) - len(starts)
            judged_twice += len(starts)
            conflict = np.flatnonzero((counts[:, 0] > 0) & (counts[:, 1] > 0))
            conflict = conflict[np.argsort(records["row"][starts[conflict]])]
            conflicting += len(conflict)
            for group in conflict[: SHOWN - len(shown)]:
                inside = records[starts[group] : ends[group]]
                shown.append(sorted(int(inside["row"][inside["vote"] == vote][0]) for vote in (0, 1)))
            if self.card.votes is not None:  # what is learnt is what they say together
                self._count_judged(records, sign=-1)
                together = records[starts].copy()
                together["vote"] = np.where(counts[:, 0] == counts[:, 1], 2, counts[:, 1] > counts[:, 0])
                self._count_judged(together)
            judged.append(_votes_of_annotators(records, starts))
        # Which of two completions is label 0 is chance: each pair counts both ways round.
        votes = np.concatenate(judged) if judged else np.zeros((0, 3), np.int64)
        agreement = krippendorff_alpha(np.concatenate([votes, votes[:, [1, 0, 2]]])) if len(votes) else None
        result.labels = {
            "pairs": pairs,
            "pairs_judged_more_than_once": judged_twice,
            "conflicting": {"pairs": conflicting, "examples": self._places(shown)},
            "ties": self.ties,
            "annotators": dict(self.annotators.most_common(20)),
            "annotator_count": len(self.annotators),
            "krippendorff_alpha": agreement,
            "pairs_judged_by_several_annotators": len(votes),
        }
        if self.book.sides:
            result.labels["votes"] = {side: self.book.sides[side] for side in ("first", "second", "tie")}
        if self.best_at:
            result.labels["best_stands_at"] = {str(place): self.best_at[place] for place in sorted(self.best_at)}

    def _tell_merged(self, result: Audit) -> None:
        """Count what happens to whole rows once all have been seen, as `load_examples` does it."""
        rows = result.rows
        if self.card.votes is not None:
            rows["kept"] = result.labels["pairs"]
            rows["merged"]["votes on one pair"] = self.book.kept_so_far - rows["kept"]
        shared = result.prompts.get("shared_between_splits", {"rows": 0})
        if shared["rows"] and self.card.shared_prompts == "drop":
            rows["kept"] -= shared["rows"]
            shown = [one for one, _ in shared["examples"]]
            rows["dropped"]["prompt is also held out"] = {"rows": shared["rows"], "examples": shown}

    def _tell_lengths(self, result: Audit) -> None:
        divisor = {"completion": self.characters["completions"] or self.count}
        result.lengths = {
            f"{what}_characters": round(total / divisor.get(what, self.count), 1)
            for what, total in self.characters.items()
            if what != "completions"
        }
        if self.longer["pairs"]:
            right = self.longer["longer"] + self.longer["equal"] / 2
            result.lengths["longer_wins"] = round(right / self.longer["pairs"], 4)

    def _tell_tokens(self, result: Audit) -> None:
        if self.measured is None:
            return
        lengths = np.array(self.tokens)
        result.tokens = {
            "base": self.measured.name,
            "context": self.measured.context,
            "sampled_rows": len(lengths),
            **{name: int(np.quantile(lengths, q)) for name, q in (("median", 0.5), ("p95", 0.95), ("longest", 1.0))},
            "too_long": {
                "rows": self.too_long["rows"],
                "tokens_to_cut": self.too_long["tokens"],
                "rows_whose_completion_alone_is_too_long": self.too_long["completion alone"],
                "examples": self.too_long_shown,
            },
        }

    def _places(self, groups: Sequence[Sequence[int]]) -> list[list[str]]:
        """Return "file:line" of rows by their numbers."""
        places = []
        for group in groups:
            named = []
            for row in group:
                self.rows.seek(row * ROW.itemsize)
                named.append(self._place(np.frombuffer(self.rows.read(ROW.itemsize), ROW)[0]))
            places.append(named)
        return places


# ---------------------------------------------------------------- what texts hold

_CONTROL = np.array([(number < 32 and chr(number) not in "\t\n\r") or number == 127 for number in range(256)])


def _numbers(characters: str) -> list[int]:
    """Return the numbers of characters, "a-c" being three of them."""
    if len(characters) == 3 and characters[1] == "-":
        return list(range(ord(characters[0]), ord(characters[2]) + 1))
    return [ord(character) for character in characters]


def _matching(pattern: re.Pattern[str], batch: Batch, rows: Iterable[int]) -> np.ndarray:
    """Return those of the rows of which a text has a match."""
    columns = [batch.prompts, *batch.answers]
    return np.array([row for row in rows if any(pattern.search(column[row]) for column in columns)], dtype=int)


def _is_structured(text: str) -> bool:
    """Return whether a text is a list or an object of JSON."""
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def _rows_at(positions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return in which rows the bytes at these positions are."""
    return np.searchsorted(offsets, positions, side="right") - 1


def _scripts(letters: np.ndarray) -> dict[str, float]:
    """Return the share of letters in each script, the most frequent first, by the first word of their Unicode names."""
    counts: Counter[str] = Counter()
    for number in np.flatnonzero(letters):
        letter = chr(int(number))
        if letter.isalpha():
            name = unicodedata.name(letter, "unnamed").split()[0].removeprefix("FULLWIDTH-")
            counts[{"CJK": "Han"}.get(name, name.capitalize())] += int(letters[number])
    return {name: round(number / counts.total(), 4) for name, number in counts.most_common()}


# ---------------------------------------------------------------- what judgements and figures tell


def _votes_of_annotators(records: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the votes [pairs, 3] of named annotators on the pairs that several judged; each has one, the first."""
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(records))))
    named = np.flatnonzero(records["who"])
    keys = group[named].astype(np.uint64) << np.uint64(32) | records["who"][named].astype(np.uint64)
    _, first = np.unique(keys, return_index=True)
    votes = np.zeros((len(starts), 3), np.int64)
    np.add.at(votes, (group[named[first]], records["vote"][named[first]]), 1)
    return votes[votes.sum(axis=1) > 1]


def _warnings(found: Audit) -> Iterator[str]:
    rows = found.duplicates["of_rows"]
    if rate := found.duplicates["exact"]["rows"]:
        yield f"{rate:,} rows ({rate / rows:.1%}) repeat another one exactly"
    if rate := found.duplicates["near"]["rows"]:
        yield f"about {rate:,} rows ({rate / rows:.1%}) nearly repeat another one"
    shared = found.prompts.get("shared_between_splits", {}).get("rows")
    if shared and "prompt is also held out" not in found.rows["dropped"]:
        yield f"{shared:,} rows to train on have a prompt that is also held out"
    if conflicts := found.labels.get("conflicting", {}).get("pairs"):
        yield f"{conflicts:,} pairs of completions are judged both ways"
    longer = found.lengths.get("longer_wins", 0.5)
    if abs(longer - 0.5) > 0.1:
        which = "longer" if longer > 0.5 else "shorter"
        yield f"the {which} one wins {max(longer, 1 - longer):.0%} of the pairs: a reward model may learn length"
    votes = found.labels.get("votes", {})
    sided = votes.get("first", 0) + votes.get("second", 0)
    if sided and abs(votes["first"] / sided - 0.5) > 3 * 0.5 / sided**0.5:
        yield f"the completion shown first wins {votes['first'] / sided:.1%} of the votes; was their order random?"
    alpha = found.labels.get("krippendorff_alpha")
    if alpha is not None and alpha < 0.4:
        yield f"annotators agree little: Krippendorff's alpha is {alpha:.2f}"
    if cut := found.tokens.get("too_long", {}).get("rows"):
        yield f"{cut:,} rows are longer than the context of {found.tokens['context']:,} tokens"
    for what, note in found.suspicious.items():
        yield f"{note['rows']:,} rows with {what}, first in {note['examples'][0]}{WAYS.get(what, '')}"
