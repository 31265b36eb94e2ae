"""What an audit found, as JSON and for a person to read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rlhf_kit.audit import Audit

__all__ = ["as_json", "lines_of"]


def as_json(found: Audit) -> str:
    """Return an audit as JSON."""
    return json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n"


def lines_of(found: Audit) -> list[str]:
    """Return an audit for a person to read."""
    rows = found.rows
    lines = [f"{found.card}: {found.kind}", f"rows        {rows['read']:,} read, {rows['kept']:,} kept"]
    for reason, note in rows["dropped"].items():
        lines.append(f"            {note['rows']:,} dropped: {reason}")
        lines += [f"              {example}" for example in note["examples"][:2]]
    for how in ("merged", "noted"):
        lines += [f"            {number:,} {how}: {what}" for what, number in rows[how].items() if number]
    if not found.duplicates:
        return lines
    for name in ("exact", "near"):
        note = found.duplicates[name]
        lines.append(f"duplicates  {'about ' * (name == 'near')}{note['rows']:,} {name}{_shown(note['examples'])}")
    heldout = found.prompts["heldout"]
    held = f"{heldout:.0%} held out, by hash" if isinstance(heldout, float) else f"{heldout:,} rows held out"
    distinct = f"{found.prompts['distinct']:,} distinct; " if "distinct" in found.prompts else ""
    lines.append(f"prompts     {distinct}{held}")
    if shared := found.prompts.get("shared_between_splits"):
        dropped = "prompt is also held out" in rows["dropped"]
        left_out = ", left out of training; the figures here still count them" if shared["rows"] and dropped else ""
        lines.append(
            f"            {shared['rows']:,} rows on both sides of the split{left_out}{_shown(shared['examples'])}"
        )
    lines += _label_lines(found.labels)
    described = [f"{name.removesuffix('_characters')} {value:,.0f}" for name, value in found.lengths.items()
                 if name.endswith("_characters")]  # fmt: skip
    lines.append(f"characters  on average: {', '.join(described)}")
    if "longer_wins" in found.lengths:
        lines.append(f'            a rule "longer wins" would be right in {found.lengths["longer_wins"]:.1%}')
    lines += _token_lines(found.tokens)
    scripts = ", ".join(f"{name} {share:.1%}" for name, share in list(found.scripts.items())[:6])
    lines.append(f"scripts     {scripts or 'no letters'}")
    for what, note in found.suspicious.items():
        lines.append(f"suspicious  {note['rows']:,} rows with {what}: {', '.join(note['examples'])}")
    return lines + [f"warning     {warning}" for warning in found.warnings]


def _label_lines(labels: Mapping[str, Any]) -> Iterator[str]:
    if not labels:
        return
    yield (
        f"labels      {labels['pairs']:,} pairs, {labels['ties']:,} ties, "
        f"{labels['conflicting']['pairs']:,} judged both ways{_shown(labels['conflicting']['examples'])}"
    )
    if "votes" in labels:
        yield "            votes: " + ", ".join(f"{side} {number:,}" for side, number in labels["votes"].items())
    if "best_stands_at" in labels:
        yield "            the best one stands at: " + ", ".join(
            f"{place} ({number:,})" for place, number in labels["best_stands_at"].items()
        )
    if labels["annotator_count"]:
        alpha = labels["krippendorff_alpha"]
        several = labels["pairs_judged_by_several_annotators"]
        agreement = (
            "no pair judged by two"
            if alpha is None
            else f"Krippendorff's alpha {alpha:.3f} over the {several:,} pairs that several of them judged"
        )
        yield f"annotators  {labels['annotator_count']:,}; {agreement}"


def _token_lines(tokens: Mapping[str, Any]) -> Iterator[str]:
    if not tokens:
        return
    context = "none known" if tokens["context"] is None else f"{tokens['context']:,}"
    yield (
        f"tokens      of {tokens['base']}: median {tokens['median']:,}, 95 % {tokens['p95']:,}, longest "
        f"{tokens['longest']:,} of {tokens['sampled_rows']:,} rows sampled; context {context}"
    )
    long = tokens["too_long"]
    if long["rows"]:
        yield (
            f"            {long['rows']:,} rows are longer: {long['tokens_to_cut']:,} tokens would be cut, "
            f"{long['rows_whose_completion_alone_is_too_long']:,} have a completion that alone is too long: "
            + ", ".join(long["examples"])
        )


def _shown(examples: Sequence[Sequence[str]]) -> str:
    return f": {'; '.join(' and '.join(places) for places in examples[:2])}" if examples else ""
