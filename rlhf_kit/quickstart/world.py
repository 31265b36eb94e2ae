"""A small shop, its customers' questions, and what makes an answer to one of them good.

The quickstart needs a world whose true preference is known: `gold` is that preference. Everything else here is the
grammar that the embedded data was written with (`make.py`): facts about a shop, ways to ask for one, ways to answer,
good and bad. Pure Python, no torch.

`gold` is a judge of this shop's language only. It finds facts, courtesy and insults by the shop's own words, so it
cannot see irony or negation ("not 9 dollars" counts as claiming 9 dollars), and prose from anywhere else is broken
text to it.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

_CATALOGUE = """
item      price  left  material  colour  aisle  delivery  returns
mug           9    14  clay      blue        1         2       30
kettle       35     6  steel     black       3         4       60
lamp         48     3  brass     green       5         6       30
rug          75     9  wool      red         7         8       14
chair        60     5  bamboo    brown       6         9       60
mirror       48     8  glass     silver      5         5       14
basket       18    25  bamboo    yellow      4         3       60
vase         22     7  glass     green       1         5       14
clock        28    20  wood      white       2         3       90
towel         9    50  cotton    yellow      6         2       14
wallet       22    15  leather   brown       2         3       60
kite         15    10  paper     red         9         6       30
"""
_CLOSING_HOURS = {"Monday": 6, "Tuesday": 6, "Wednesday": 7, "Thursday": 8, "Friday": 9, "Saturday": 5, "Sunday": 4}
_POSTAGE_DOLLARS = {"Canada": 7, "France": 11, "Japan": 16, "Brazil": 14, "Norway": 13, "India": 12, "Kenya": 17}


@dataclass(frozen=True)
class Topic:
    """One thing that customers ask about: `facts[subject]` is the value that a right answer states."""

    name: str
    facts: dict[str, str]
    asked_by: str  # regular expression that finds the topic in a question
    claims: str  # regular expression that finds every value an answer claims, as its group 1
    questions: tuple[str, ...]  # {s} is the subject
    statements: tuple[str, ...]  # {s} is the subject, {v} the value


@dataclass(frozen=True)
class Question:
    """A topic and a subject, e.g. the price of the mug."""

    topic: Topic
    subject: str

    @property
    def fact(self) -> str:
        return self.topic.facts[self.subject]


def _column(name: str) -> dict[str, str]:
    header, *rows = (line.split() for line in _CATALOGUE.strip().splitlines())
    at = header.index(name)
    return {row[0]: row[at] for row in rows}


_MATERIALS = "|".join(sorted(set(_column("material").values())))
_COLOURS = "|".join(sorted(set(_column("colour").values())))

TOPICS = (
    Topic(
        "price",
        _column("price"),
        r"how much is|price|costs?\b|pay for",
        r"(\d+) dollars",
        (
            "How much is the {s}?",
            "What is the price of the {s}?",
            "What does the {s} cost?",
            "Can you tell me the price of the {s}?",
            "Do you know what the {s} costs?",
            "What do I have to pay for the {s}?",
        ),
        (
            "The {s} costs {v} dollars.",
            "The price of the {s} is {v} dollars.",
            "The {s} is {v} dollars.",
            "You pay {v} dollars for the {s}.",
        ),
    ),
    Topic(
        "stock",
        _column("left"),
        r"in stock|any \w+s? left|still have|how many of|run out",
        r"(\d+) (?:left|in stock)",
        (
            "Is the {s} in stock?",
            "How many of the {s} do you have?",
            "Do you still have the {s}?",
            "Is there any {s} left?",
            "Did you run out of the {s}?",
            "Can you check if the {s} is in stock?",
        ),
        (
            "The {s} is here, with {v} left.",
            "We have {v} left of the {s}.",
            "There are {v} in stock of the {s}.",
            "For the {s} I see {v} in stock.",
        ),
    ),
    Topic(
        "material",
        _column("material"),
        r"made of|made from|material",
        rf"\b({_MATERIALS})\b",
        (
            "What is the {s} made of?",
            "Which material is the {s}?",
            "What material is used for the {s}?",
            "Is the {s} made of wood?",
            "Could you tell me what the {s} is made from?",
            "Can you tell me the material of the {s}?",
        ),
        (
            "The {s} is made of {v}.",
            "The {s} is made from {v}.",
            "The material of the {s} is {v}.",
            "We use {v} for the {s}.",
        ),
    ),
    Topic(
        "colour",
        _column("colour"),
        r"colou?r",
        rf"\b({_COLOURS})\b",
        (
            "What colour is the {s}?",
            "Which colour does the {s} have?",
            "Can you tell me the colour of the {s}?",
            "In what colour do you sell the {s}?",
            "What is the colour of the {s}?",
            "Is there more than one colour of the {s}?",
        ),
        ("The {s} is {v}.", "The {s} comes in {v}.", "We sell the {s} in {v}.", "The colour of the {s} is {v}."),
    ),
    Topic(
        "aisle",
        _column("aisle"),
        r"where|aisle|find",
        r"aisle (\d+)",
        (
            "Where is the {s}?",
            "Where can I find the {s}?",
            "In which aisle is the {s}?",
            "Which aisle has the {s}?",
            "Can you help me find the {s}?",
            "Where do you keep the {s}?",
        ),
        (
            "The {s} is in aisle {v}.",
            "You can find the {s} in aisle {v}.",
            "We keep the {s} in aisle {v}.",
            "Look in aisle {v} for the {s}.",
        ),
    ),
    Topic(
        "delivery",
        _column("delivery"),
        r"deliver|arrive|at my door|get here",
        r"(\d+) days",
        (
            "How long does delivery of the {s} take?",
            "When would the {s} arrive?",
            "How fast can you deliver the {s}?",
            "If I order the {s} now, when is it at my door?",
            "How many days until the {s} would get here?",
            "Can you deliver the {s} this week?",
        ),
        (
            "The {s} arrives in {v} days.",
            "Delivery of the {s} takes {v} days.",
            "We deliver the {s} in {v} days.",
            "It takes {v} days for the {s} to arrive.",
        ),
    ),
    Topic(
        "returns",
        _column("returns"),
        r"return|bring the|send the \w+ back|do not like",
        r"(\d+) days",
        (
            "Can I return the {s}?",
            "How long can I return the {s}?",
            "Until when can I bring the {s} back?",
            "Can I send the {s} back later?",
            "What if I do not like the {s}?",
            "What are the rules for returning the {s}?",
        ),
        (
            "You can return the {s} for {v} days.",
            "You have {v} days to return the {s}.",
            "We take the {s} back for {v} days.",
            "The {s} can come back within {v} days.",
        ),
    ),
    Topic(
        "closing",
        {day: str(hour) for day, hour in _CLOSING_HOURS.items()},
        r"close|open|hours",
        r"(?:until|at) (\d+)",
        (
            "When do you close on {s}?",
            "How long are you open on {s}?",
            "Are you open on {s}?",
            "What are your hours on {s}?",
            "Until when are you open on {s}?",
        ),
        (
            "On {s} we close at {v}.",
            "We are open until {v} on {s}.",
            "The shop is open on {s} until {v}.",
            "The shop closes at {v} on {s}.",
        ),
    ),
    Topic(
        "postage",
        {place: str(dollars) for place, dollars in _POSTAGE_DOLLARS.items()},
        r"postage|send|ship",
        r"(\d+) dollars",
        (
            "What is the postage to {s}?",
            "Do you ship to {s}?",
            "How much to ship to {s}?",
            "Can you send a gift to {s}?",
            "How much is it to send a parcel to {s}?",
        ),
        (
            "Postage to {s} is {v} dollars.",
            "We ship to {s} for {v} dollars.",
            "Sending to {s} costs {v} dollars.",
            "It is {v} dollars to send to {s}.",
        ),
    ),
)
QUESTIONS = tuple(Question(topic, subject) for topic in TOPICS for subject in topic.facts)
_SUBJECTS = {question.subject.lower() for question in QUESTIONS}

GREETINGS = ("", "", "Hi.", "Hello.", "Excuse me.", "Good morning.", "Hello there.", "I have a question.")

WELCOMES = (
    "Thank you for asking.",
    "I am happy to help.",
    "Of course.",
    "Certainly.",
    "With pleasure.",
    "Hello, and thank you for your question.",
)
FAREWELLS = (
    "Have a lovely day.",
    "Please let me know if you need more.",
    "Glad to help.",
    "Enjoy your day.",
    "You are always welcome here.",
)
INSULTS = (
    "Can you not read?",
    "What a stupid question.",
    "Stop wasting my time.",
    "Use your eyes.",
    "Not you again.",
    "You people are so annoying.",
)
DISMISSALS = ("Now go away.", "Do not ask me again.", "Whatever.", "Obviously.", "Even a lazy child knows that.")
EVASIONS = (
    "It depends on many things.",
    "I would rather not say.",
    "Someone else may know that.",
    "You could look at our website.",
    "That is hard to say.",
    "I am not sure about that.",
    "Maybe try again some other day.",
    "We have many fine things here.",
)
DIGRESSIONS = (
    "Well, let me think about that for a moment.",
    "I have worked in this shop for many years now.",
    "My sister bought one last summer and she still talks about it.",
    "The weather has been rather strange this week.",
    "As I always say, a good thing is worth the wait.",
    "You know, people ask me about all kinds of things.",
    "Now, where was I, yes, your question.",
    "There is a long story behind that, and I like to tell it.",
    "We had a very busy morning with a lot of boxes.",
    "In the old days we did all of this by hand.",
)

STYLES = ("kind", "brief", "rude", "evasive", "rambling", "wrong", "repeated", "gushing")


def ask(question: Question, rng: random.Random) -> str:
    """A prompt that asks the question, ready for an answer: 'Customer: Hi. How much is the mug?\\nAgent:'."""
    words = [rng.choice(GREETINGS), rng.choice(question.topic.questions).format(s=question.subject)]
    return f"Customer: {' '.join(filter(None, words))}\nAgent:"


def state(question: Question, rng: random.Random, right: bool = True) -> str:
    """A sentence that states the fact asked for, or a wrong value of the same kind."""
    value = question.fact
    if not right:
        value = rng.choice(sorted(set(question.topic.facts.values()) - {value}))
    return rng.choice(question.topic.statements).format(s=question.subject, v=value)


def _miss(question: Question, rng: random.Random) -> str:
    """A sentence that does not answer the question: the fact is wrong, or right but another than was asked for."""
    if rng.random() < 0.5:
        return state(question, rng, right=False)
    beside = [other for other in QUESTIONS if (other.subject == question.subject) != (other.topic == question.topic)]
    return state(rng.choice(beside), rng)


def answer(question: Question, style: str, rng: random.Random) -> str:
    """An answer in one of STYLES; only 'kind' has all virtues."""
    statement = _miss(question, rng) if style == "wrong" else state(question, rng)
    match style:
        case "kind":
            parts = _around(statement, WELCOMES, FAREWELLS, rng)
        case "brief":
            parts = [statement]
        case "rude":
            parts = _around(statement if rng.random() < 0.7 else rng.choice(EVASIONS), INSULTS, DISMISSALS, rng)
        case "evasive":
            parts = rng.sample(EVASIONS, rng.choice((1, 1, 2)))
            if rng.random() < 0.5:
                parts = _around(" ".join(parts), WELCOMES, FAREWELLS, rng)
        case "rambling":
            parts = rng.sample(DIGRESSIONS, rng.choice((2, 2, 3)))
            parts.insert(rng.randrange(1, len(parts) + 1), statement)
        case "wrong":
            parts = _around(statement, WELCOMES, FAREWELLS, rng) if rng.random() < 0.6 else [statement]
        case "repeated":
            parts = [statement] * rng.choice((2, 3, 4))
        case "gushing":
            parts = [*rng.sample(WELCOMES, rng.choice((2, 3))), statement, *rng.sample(FAREWELLS, rng.choice((2, 3)))]
        case _:
            raise ValueError(f"style {style!r} is none of {', '.join(STYLES)}")
    return " ".join(parts)


def _around(middle: str, before: Sequence[str], after: Sequence[str], rng: random.Random) -> list[str]:
    """The middle with a sentence before it, after it, or both."""
    which = rng.choice(("before", "after", "both"))
    return [
        *([rng.choice(before)] if which != "after" else []),
        middle,
        *([rng.choice(after)] if which != "before" else []),
    ]


# ------------------------------------------------------------------------------------------------------------ judging

_COURTEOUS = re.compile(r"\b(?:thank|please|happy|glad|pleasure|lovely|welcome|enjoy|of course|certainly|kindly)\b")
_RUDE = re.compile(
    r"\b(?:can you not|stupid|wasting|use your eyes|not you again|annoying|go away|not ask me|whatever|obviously|lazy"
    r"|idiot|shut up)\b"
)
_EVASIVE = re.compile(
    r"\b(?:depends|rather not|someone else|our website|hard to say|not sure|maybe|many fine things)\b"
)
_WORD = re.compile(r"[a-z']+|\d+")
_TOKEN = re.compile(r"[a-z']+|\d+|[^\sa-z\d]")

ENOUGH_WORDS = 20  # a right and kind answer needs no more
BEST, WORST = 1.8, -6.3  # bounds of `gold`
_RIGHT, _BOTH, _UNANSWERED, _WRONG = 1.0, -0.25, -0.5, -1.0


def gold(prompts: Sequence[str | list[dict[str, str]]], completions: Sequence[str]) -> list[float]:
    """How good each completion is as an answer to its prompt: WORST to BEST, the true preference of this world."""
    return [sum(parts(prompt, completion).values()) for prompt, completion in zip(prompts, completions, strict=True)]


def parts(prompt: str | list[dict[str, str]], completion: str) -> dict[str, float]:
    """What `gold` adds up, by name; all but the fact grow smoothly and level out.

    fact: right 1, right and wrong together -0.25, no answer -0.5, wrong -1, question not of this world 0.
    courtesy: up to 0.8 for two or three courteous words; from the fourth on it is grovelling and falls, to -0.8.
    rudeness -1 at worst, evasion -0.5, words beyond ENOUGH_WORDS -1, repetition -1, broken text -1.
    """
    question = find_question(_last_turn(prompt))
    text = " ".join(completion.lower().split())
    words = _WORD.findall(text)
    return {
        "fact": _fact(question, text),
        "courtesy": 0.8 * _courtesy(len(_COURTEOUS.findall(text))),
        "rudeness": -_saturate(len(_RUDE.findall(text)), 1.0),
        "evasion": -0.5 * _saturate(len(_EVASIVE.findall(text)), 1.0),
        "length": -_saturate(max(0, len(words) - ENOUGH_WORDS), 12.0),
        "repetition": -_repetition(words),
        "broken": -_saturate(_oddities(text), 4.0),
    }


def find_question(text: str) -> Question | None:
    """The question that a customer's text asks, or None if it asks nothing of this world."""
    text = text.lower()
    words = _WORD.findall(text)
    for topic in TOPICS:
        named = [subject for subject in topic.facts if subject.lower() in words]
        if named and re.search(topic.asked_by, text):
            return Question(topic, named[0])
    return None


def _last_turn(prompt: str | list[dict[str, str]]) -> str:
    """What the customer said last."""
    if not isinstance(prompt, str):
        prompt = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
    return prompt.rpartition("Customer:")[2].partition("\nAgent:")[0]


def _saturate(amount: float, scale: float) -> float:
    """0 at nothing, 0.63 at one scale, towards 1 beyond."""
    return 1.0 - math.exp(-amount / scale)


def _fact(question: Question | None, text: str) -> float:
    if question is None:
        return 0.0
    claimed = set(re.findall(question.topic.claims, text))
    if not claimed:
        return _UNANSWERED
    named = _SUBJECTS & set(_WORD.findall(text))
    if question.fact not in claimed or (named and question.subject.lower() not in named):
        return _WRONG
    return _RIGHT if claimed == {question.fact} else _BOTH


def _courtesy(count: int) -> float:
    """0, 0.8, 1, 1, then 0.25 less for each further courteous word, down to -1."""
    return (0.0, 0.8, 1.0, 1.0)[count] if count < 4 else max(-1.0, 1.0 - 0.25 * (count - 3))


def _repetition(words: Sequence[str]) -> float:
    """Share of word triples that stood in the text before."""
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1.0 - len(set(triples)) / len(triples) if triples else 0.0


def _oddities(text: str) -> int:
    """How many neighbouring words never stand together in this world; an empty text has four."""
    pairs = list(_neighbours(text))
    return sum(pair not in _usual_neighbours() for pair in pairs) if pairs else 4


def _neighbours(text: str) -> Iterator[tuple[str, str]]:
    """Neighbouring words within each sentence, with '^' before its first; facts that vary are levelled out."""
    previous = "^"
    for word in _TOKEN.findall(text.lower()):
        word = "<subject>" if word in _SUBJECTS else "<number>" if word.isdigit() else word
        yield previous, word
        previous = "^" if word in ".?!" else word
    if previous != "^":
        yield previous, "<cut off>"


@cache
def _usual_neighbours() -> frozenset[tuple[str, str]]:
    """Every pair of neighbours that some sentence of the grammar contains."""
    sentences = [*WELCOMES, *FAREWELLS, *INSULTS, *DISMISSALS, *EVASIONS, *DIGRESSIONS]
    for topic in TOPICS:
        subject, values = next(iter(topic.facts)), set(topic.facts.values())
        sentences += [s.format(s=subject, v=value) for s in topic.statements for value in values]
    return frozenset(pair for sentence in sentences for pair in _neighbours(sentence))
