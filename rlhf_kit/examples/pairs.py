"""Pairs of completions, and the votes on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from rlhf_kit.data_files import short
from rlhf_kit.examples.book import Book, Broken, LeftOut
from rlhf_kit.examples.cells import Cells
from rlhf_kit.examples.messages import kept
from rlhf_kit.examples.rows import Preference, encode, probability_of
from rlhf_kit.examples.transcripts import common_prefix, hh

__all__ = ["counted_votes", "preferences_of"]


def preferences_of(read: Cells) -> Iterator[Preference]:
    """Yield the row's pair once for each vote on it; or raise Broken."""
    card = read.card
    pair = ["chosen", "rejected"] if "chosen" in card.columns else ["first", "second"]
    how = {"hh": hh, "common_prefix": common_prefix}.get(str(card.format), Cells.prompt_and_answers)
    prompt, (first, second) = how(read, pair)
    if first.strip() == second.strip():
        raise Broken(f"{pair[0]} equal to {pair[1]}", f'{pair[0]} is equal to {pair[1]}: "{short(first)}"')
    prompt = kept(prompt)
    ratings = read.numbers("ratings", 2) if "ratings" in card.columns else None
    margin = read.margin()
    if ratings is not None and card.margin_per_point is not None:
        margin = card.margin_per_point * abs(ratings[0] - ratings[1])
    for probability, annotator in _judgements(read, pair, ratings):
        if pair[0] == "first":
            read.votes.append(probability)
        sides = (first, second) if probability >= 0.5 else (second, first)
        share = max(probability, 1 - probability)
        yield Preference(prompt, *sides, read.where, margin, annotator, None if share == 1 else share)


def _judgements(read: Cells, pair: Sequence[str], ratings: list[float] | None) -> Iterator[tuple[float, str | None]]:
    """Yield, for each vote on the pair, the probability that the first one is better and who says so."""
    card = read.card
    if "preferred" in card.columns:
        votes = read.cell("preferred", gaps=True)
        if not isinstance(votes, list):
            yield _agreed(read, votes, read.vote(votes), ratings), read.annotator()
            return
        if not votes:
            raise Broken("no vote", f"{read.called('preferred')} is an empty list")
        if len(votes) > 1 and card.votes is None:
            raise Broken(
                "several votes on a pair",
                f"{read.called('preferred')} holds {len(votes)} votes; write votes: majority or votes: probability",
            )
        who = read.cell("annotator") if read.has("annotator") else None
        named = who if isinstance(who, list) and len(who) == len(votes) else [who] * len(votes)
        for vote, name in zip(votes, named, strict=True):
            try:
                share = read.vote(vote)
            except LeftOut:
                read.votes_left_out += 1
                continue
            share = share if len(votes) > 1 else _agreed(read, vote, share, ratings)
            yield share, None if name in (None, "") or isinstance(name, list) else str(name)
        if read.votes_left_out == len(votes):
            raise LeftOut("no vote that counts")
        return
    if "probability" in card.columns:
        probability = read.number("probability", read.cell("probability"))
        if not 0 <= probability <= 1:
            raise Broken("no probability", f"{read.called('probability')} lies between 0 and 1; seen {probability:g}")
    elif ratings is not None and pair[0] == "first":
        probability = 0.5 if ratings[0] == ratings[1] else float(ratings[0] > ratings[1])
    else:
        probability = 1.0
        if ratings is not None and ratings[0] == ratings[1]:
            probability = 0.5
        if ratings is not None and ratings[0] < ratings[1]:
            raise Broken("chosen is rated lower", f"chosen is rated {ratings[0]:g} and rejected {ratings[1]:g}")
    yield probability, read.annotator()


def _agreed(read: Cells, vote: Any, share: float, ratings: list[float] | None) -> float:
    """Return the share of a row's one vote, which may part equal ratings, but not contradict different ones."""
    rated = 0.0 if ratings is None else ratings[0] - ratings[1]
    if ratings is not None and rated and (share - 0.5) * rated <= 0:
        raise Broken(
            "preferred and ratings disagree",
            f"{read.called('preferred')} is {short(vote)}, and first is rated {ratings[0]:g}, second {ratings[1]:g}; "
            "where the two need not agree, map only one of them",
        )
    return share


def counted_votes(rows: Iterable[Preference], votes: str, book: Book) -> Iterator[Preference]:
    """Yield one row for all votes on a pair of completions, where the first of them stood.

    A vote counts by its probability, a tie a half for either side. No annotator is named where there were several.
    """
    pairs: dict[str, list[Preference]] = {}
    before = book.kept_so_far
    for row in rows:
        pairs.setdefault(encode([row.prompt, *sorted((row.chosen, row.rejected))]), []).append(row)
    book.merged["votes on one pair"] += book.kept_so_far - before - len(pairs)
    for cast in pairs.values():
        first = cast[0]
        share = sum(
            probability_of(row) if row.chosen == first.chosen else 1 - probability_of(row) for row in cast
        ) / len(cast)
        if votes == "majority":
            share = 0.5 if share == 0.5 else float(share > 0.5)
        chosen, rejected = (first.chosen, first.rejected) if share >= 0.5 else (first.rejected, first.chosen)
        share = max(share, 1 - share)
        annotators = {row.annotator for row in cast}
        yield replace(
            first,
            chosen=chosen,
            rejected=rejected,
            annotator=annotators.pop() if len(annotators) == 1 else None,
            probability=None if share == 1 else share,
        )
