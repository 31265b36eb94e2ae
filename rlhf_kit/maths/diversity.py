"""How varied texts are, as sequences of tokens. Plain numbers; no tensors."""

from collections.abc import Hashable, Sequence


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Every run of `n` neighbouring tokens, in order; none of a text shorter than that."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams of the texts together: 1 where none comes twice, near 0 where all are alike.

    0 where no text has `n` tokens. It falls with the number and length of the texts: compare like with like.
    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.2.
    """
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else 0.0


def repetition(text: Sequence[Hashable], n: int = 4) -> float:
    """Share of a text's n-grams that stood in it before: 0 of a text that never repeats itself, or is too short.

    Source: Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", section 6.1 (seq-rep-n).
    """
    found = ngrams(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0
