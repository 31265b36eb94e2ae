"""Rankings: of one row, or put together of rows with a completion each, or of messages in a tree of dialogues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_kit.columns import value_of
from rlhf_kit.data_cards import DataCard, names_of
from rlhf_kit.data_files import short
from rlhf_kit.examples.book import Book, Broken
from rlhf_kit.examples.cells import Cells
from rlhf_kit.examples.messages import checked_text, kept, our_role
from rlhf_kit.examples.rows import Prompt, Ranking, encode
from rlhf_kit.examples.transcripts import hh_prompt

__all__ = ["Answer", "Turn", "put_together", "ranking_of", "threads", "turn_of"]

COMPLETIONS = (2, 9)
"""Of one ranking, at least and at most."""


def ranking_of(read: Cells) -> Ranking:
    """Return the ranking that a row holds whole; or raise Broken."""
    card = read.card
    cell = read.cell("completions")
    if not isinstance(cell, list):
        raise Broken("completions are no list", f"{read.called('completions')} must be a list; seen {short(cell)}")
    if not COMPLETIONS[0] <= len(cell) <= COMPLETIONS[1]:
        way = "; [:9] behind a list, of completions and what ranks them, takes the first nine"
        way *= len(cell) > COMPLETIONS[1]
        raise Broken("not 2 to 9 completions", f"{len(cell)} completions; a ranking has 2 to 9{way}")
    if card.format == "hh":
        prompt: Prompt = hh_prompt(read.text("prompt"))
        completions = [checked_text(one, "completion", read.called("completions")) for one in cell]
    else:
        prompt, completions = read.answered([("completion", read.called("completions"), one) for one in cell])
    ratings = None
    if read.has("ratings"):
        ratings = read.numbers("ratings", len(completions))
        ranks = _ranks(ratings, best_is_high=True)
    elif "comparisons" in card.columns:
        shares = _shares(read, len(completions))
        ranks = _ranks(_wins(shares, len(completions)), best_is_high=True)
        read.ordered_draws = sum(share == 0.5 and ranks[one] != ranks[two] for (one, two), share in shares.items())
    elif "ranked" in card.columns:
        ranks = _ranks(_by_name(read, len(completions)), best_is_high=False)
    else:
        ranks = _ranks(read.numbers("ranks", len(completions)), best_is_high=False)
        _check_order(read)
    return _ranked(prompt, completions, ranks, ratings, read.where, read.annotator(), card.margin_per_point)


def _ranked(
    prompt: Prompt,
    completions: list[str],
    ranks: list[float],
    ratings: list[float] | None,
    where: str,
    annotator: str | None,
    margin_per_point: float | None = None,
) -> Ranking:
    if len({completion.strip() for completion in completions}) < len(completions):
        twice = Counter(completion.strip() for completion in completions).most_common(1)[0][0]
        raise Broken("equal completions", f'a completion stands twice in the ranking: "{short(twice)}"')
    return Ranking(kept(prompt), completions, ranks, where, ratings, annotator, margin_per_point or 0.0)


def _ranks(numbers: Sequence[float], best_is_high: bool) -> list[float]:
    """Return 1 for the best and for each other one 1 more than there are better ones; equal numbers tie."""
    sign = 1 if best_is_high else -1
    return [1.0 + sum(sign * other > sign * number for other in numbers) for number in numbers]


def _by_name(read: Cells, count: int) -> list[float]:
    """Return the rank of each completion, by its name in a list: that has ranks beside it, or is best first.

    One name that is no list is the best one's; the others tie behind it.
    """
    names, cell = _names(read, count), read.cell("ranked")
    ranked = [_name(read, name, names) for name in (cell if isinstance(cell, list) else [cell])]
    with_ranks = "ranks" in read.card.columns
    if not isinstance(cell, list) and not with_ranks:
        return [float(name not in ranked) for name in names]
    for name in names:
        if (times := ranked.count(name)) != 1:
            raise Broken(
                "not every completion ranked once",
                f"{read.called('ranked')} must have each of {', '.join(map(short, names))} once; seen {short(name)} "
                f"{times} times",
            )
    ranks = read.numbers("ranks", count) if with_ranks else list(map(float, range(count)))
    return [ranks[ranked.index(name)] for name in names]


def _check_order(read: Cells) -> None:
    """Raise Broken if the ranks stand beside the names of the completions, whose order is not theirs."""
    path, names = read.card.columns["ranks"], names_of(read.card.columns["completions"])
    if names is None or not isinstance(path, str) or "[]." not in path:
        return
    entries = path.rpartition(".")[0]
    items = value_of(entries, read.cells)
    for key in items[0] if all(isinstance(item, Mapping) for item in items) else ():
        if sorted(str(item.get(key)) for item in items) == sorted(names):
            raise Broken(
                "ranks beside names",
                f"{read.called('ranks')} stands beside {key}, which names the completions; map ranked: {entries}.{key}",
            )


def _names(read: Cells, count: int) -> list[str]:
    """Return what the completions are called, no two the same."""
    cell: Any = read.cell("names") if "names" in read.card.columns else names_of(read.card.columns["completions"])
    are_names = isinstance(cell, list) and all(isinstance(name, str | int | float) for name in cell)
    if not are_names or len(cell) != count:
        raise Broken(
            "not one of names for each completion",
            f"{read.called('names')} must be a list of {count} names; seen {short(cell)}",
        )
    names = list(map(str, cell))
    if len(set(names)) < count:
        raise Broken("equal names", f"{read.called('names')} must be different ones; seen {short(cell)}")
    return names


def _name(read: Cells, cell: Any, names: Sequence[str]) -> str:
    if not isinstance(cell, str | int | float) or str(cell) not in names:
        raise Broken(
            "ranked by an unknown name",
            f"{read.called('ranked')} has {short(cell)}, as no completion is called; known: "
            + ", ".join(map(short, names)),
        )
    return str(cell)


def _shares(read: Cells, count: int) -> dict[tuple[int, int], float]:
    """Return the first one's share, of each pair's judgement, from those of all pairs 1-2, 1-3, ..., 2-3, ..."""
    votes = read.cell("comparisons")
    pairs = [(first, second) for first in range(count) for second in range(first + 1, count)]
    if not isinstance(votes, list) or len(votes) != len(pairs):
        raise Broken(
            "not one comparison for each pair",
            f"{read.called('comparisons')} must be {len(pairs)} judgements, 1-2, 1-3, ..., of {count} completions",
        )
    return {pair: read.vote(vote) for pair, vote in zip(pairs, votes, strict=True)}


def _wins(shares: Mapping[tuple[int, int], float], count: int) -> list[float]:
    """Return how often each completion wins; ties are half. Judgements that go in a circle make completions tie."""
    wins = [0.0] * count
    for (first, second), share in shares.items():
        wins[first] += share
        wins[second] += 1 - share
    return wins


@dataclass(frozen=True)
class Answer:
    """A row that holds one completion of a ranking."""

    prompt: Prompt
    completion: str
    number: float
    """Its rank or its rating."""
    where: str
    annotator: str | None
    group: str | None
    """What rows of one ranking have in common, if it is not the prompt."""
    slices: Mapping[str, str] | None = None


def put_together(rows: Iterable[Answer], card: DataCard, book: Book) -> Iterator[Ranking]:
    """Yield one ranking for all completions of a prompt or group (and annotator), where the first of them stood."""
    groups: dict[tuple[str, str | None], list[Answer]] = {}
    for row in rows:
        groups.setdefault((row.group or encode(row.prompt), row.annotator), []).append(row)
    for whole in groups.values():
        group = whole[: card.max_completions]
        for row in whole[len(group) :]:
            book.leave_out("over max_completions", row.where)
        first, count = group[0], len(group)
        try:
            other = next((row for row in whole if row.prompt != first.prompt), None)
            if other is not None:
                raise Broken(
                    "prompts of a group differ", f"the group {short(first.group)} has another prompt in {other.where}"
                )
            _check_count(count, "completions of this prompt")
            ranking = _ranked_by_rows(first.prompt, [row.completion for row in group], group, card)
            yield replace(ranking, slices=first.slices)
            book.merged["completions of one prompt"] += count - 1
        except Broken as problem:
            book.drop(problem.reason, f"{first.where}: {problem.detail}", count)


def _ranked_by_rows(prompt: Prompt, completions: list[str], rows: Sequence[Answer | Turn], card: DataCard) -> Ranking:
    """Return the ranking of completions by the ranks, or the ratings, of the rows that hold them."""
    first, rated = rows[0], "rating" in card.columns
    numbers = [row.number for row in rows if row.number is not None]
    ranks, ratings = _ranks(numbers, best_is_high=rated), numbers if rated else None
    return _ranked(prompt, completions, ranks, ratings, first.where, first.annotator, card.margin_per_point)


def _check_count(count: int, what: str) -> None:
    """Raise Broken if so many rows make no ranking."""
    if not COMPLETIONS[0] <= count <= COMPLETIONS[1]:
        way = "; max_completions: 9 takes the first nine" * (count > COMPLETIONS[1])
        raise Broken("not 2 to 9 completions", f"{count} {what}; a ranking has 2 to 9{way}")


@dataclass(frozen=True)
class Turn:
    """A row that holds one message of a tree of dialogues."""

    id: str
    parent: str | None
    role: str
    text: str
    number: float | None
    """An answer's rank or rating."""
    where: str
    annotator: str | None


def turn_of(read: Cells) -> Turn:
    """Return the message that a row holds; or raise Broken."""
    name = "rating" if "rating" in read.card.columns else "rank"
    role = our_role(read.cell("role"), read.called("role"), read.card.roles)
    number, parent = read.cell(name), read.cell("parent")
    return Turn(
        id=str(read.cell("id")),
        parent=None if parent in (None, "") else str(parent),
        role=role,
        text=read.text("text"),
        number=None if number in (None, "") or role != "assistant" else read.number(name, number),
        where=read.where,
        annotator=read.annotator(),
    )


def threads(rows: Iterable[Turn], card: DataCard, book: Book) -> Iterator[Ranking]:
    """Yield, for each message with several ranked or rated answers of the assistant, these as a ranking.

    The prompt is the way from the root of the tree to that message. Messages that serve in none are dropped, counted.
    """
    before_these = book.kept_so_far
    turns = {turn.id: turn for turn in rows}
    book.drop_times("repeated message", book.kept_so_far - before_these - len(turns))
    answers: dict[str | None, list[Turn]] = {}
    for turn in turns.values():
        if turn.number is not None:
            answers.setdefault(turn.parent, []).append(turn)
    used: set[str] = set()
    left_out: list[Turn] = []
    count, rated = 0, "rating" in card.columns
    for whole in answers.values():
        group = whole[: card.max_completions]
        left_out += whole[len(group) :]
        first = group[0]
        try:
            _check_count(len(group), f"{'rated' if rated else 'ranked'} answers")
            before = _way_to(first.parent, turns)
            prompt = [{"role": turn.role, "content": turn.text} for turn in before]
            ranking = _ranked_by_rows(prompt, [turn.text for turn in group], group, card)
        except Broken as problem:
            book.drop(problem.reason, f"{first.where}: {problem.detail}", rows=0)
            continue
        used |= {turn.id for turn in (*before, *group)}
        count += 1
        yield ranking
    book.merged["messages of dialogues"] += len(used) - count
    left_out = [turn for turn in left_out if turn.id not in used]  # it may be on the way to another prompt
    for turn in left_out:
        book.leave_out("over max_completions", turn.where)
    book.drop_times("message of no ranking", len(turns) - len(used) - len(left_out))


def _way_to(message: str | None, turns: Mapping[str, Turn]) -> list[Turn]:
    """Return the messages from the root to one, that one included."""
    way: list[Turn] = []
    while message is not None:
        if message not in turns or len(way) > len(turns):
            raise Broken("message without its thread", f"the message {short(message)} before it is not in the data")
        way.append(turns[message])
        message = turns[message].parent
    return way[::-1]
