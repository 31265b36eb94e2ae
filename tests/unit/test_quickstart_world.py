"""The embedded world: its judge, its grammar and the data and checkpoint made from them."""

import itertools
import json
import random
import statistics
import subprocess
import sys

import pytest

from rlhf_kit.quickstart import make, world

MUG = "Customer: Hi. How much is the mug?\nAgent:"


def gold(completion: str, prompt: str | list[dict[str, str]] = MUG) -> float:
    return world.gold([prompt], [completion])[0]


def shipped(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (make.HERE / "data" / f"{name}.jsonl").read_text().splitlines()]


def test_gold_adds_up_as_documented():
    """A right and kind answer gets the best score, and each fault costs what the docstring of `parts` says."""
    assert gold(" I am happy to help. The mug costs 9 dollars. Enjoy your day.") == pytest.approx(1.8)
    assert gold(" The mug costs 9 dollars.") == pytest.approx(1.0)
    assert gold(" The mug costs 35 dollars.") == pytest.approx(-1.0)
    assert gold(" The lamp costs 9 dollars.") == pytest.approx(-1.0), "the right number for the wrong thing"
    assert world.parts(MUG, " The mug costs 9 dollars. The mug is 6 dollars.")["fact"] == -0.25
    assert gold(" That is hard to say.") == pytest.approx(-0.5 - 0.5 * (1 - 0.36788), abs=1e-4)
    assert gold(" Not you again. The mug costs 9 dollars.") == pytest.approx(1 - (1 - 0.36788), abs=1e-4)


def test_gold_orders_the_styles():
    """On average kind beats brief, that gushing, that repeated, and that all rude, evasive or wrong answers."""
    rng = random.Random(0)
    mean = {}
    for style in world.STYLES:
        questions = [rng.choice(world.QUESTIONS) for _ in range(300)]
        prompts = [world.ask(question, rng) for question in questions]
        mean[style] = statistics.mean(world.gold(prompts, [world.answer(q, style, rng) for q in questions]))
    assert mean["kind"] > mean["brief"] + 0.5
    assert mean["brief"] > mean["gushing"] > mean["repeated"]
    assert mean["repeated"] > max(mean[style] for style in ("rude", "evasive", "wrong"))


def test_gold_sees_through_reward_hacking():
    """More of what annotators like is worse from some point on: courtesy, repetition, length."""
    right = " The mug costs 9 dollars."
    for more in (" Glad to help.", " The mug costs 9 dollars.", " We had a very busy morning with a lot of boxes."):
        scores = [gold(right + more * times) for times in range(2, 9)]
        assert all(b < a for a, b in itertools.pairwise(scores)), more
        assert scores[-1] < 0 < scores[0]


def test_gold_judges_any_text():
    """Empty, foreign, cut off and run-on completions get a bounded score below the same answer well put."""
    whole = gold(" The mug costs 9 dollars.")
    for text in (
        "",
        " ",
        "\x00",
        "def f(x): return x",
        "9 dollars mug the",
        " The mug costs 9 dollars",
        "é" * 300,
        " The mug costs 9 dollars.\nCustomer: Thank you, that is right.",
        "9 " * 500,
    ):
        assert world.WORST <= gold(text) < whole, text


def test_gold_reads_chat_prompts_and_foreign_prompts():
    """The last turn is the question, in chat as in text; what is not of this world has no right or wrong answer."""
    chat = [{"role": "user", "content": "Hello."}, {"role": "user", "content": "How much is the mug?"}]
    assert gold(" The mug costs 9 dollars.", chat) == pytest.approx(1.0)
    for foreign in ("", "Human: Who wrote Faust?", "Customer: I like the mug.", "Customer: How much is the boat?"):
        assert world.parts(foreign, " The mug costs 9 dollars.")["fact"] == 0.0
    dialogue = "Customer: Where is the mug?\nAgent: Look in aisle 1 for the mug.\n" + MUG
    assert gold(" The mug costs 9 dollars.", dialogue) == pytest.approx(1.0), "only the last turn is asked"


def test_every_question_is_understood():
    """Each wording of each of the world's questions is found to ask for that topic and that subject."""
    for question in world.QUESTIONS:
        for wording in question.topic.questions:
            text = wording.format(s=question.subject)
            assert world.find_question(text) == question, text


def test_every_statement_is_understood():
    """Each statement of each fact is right and of usual words; the same with another value is wrong."""
    for question in world.QUESTIONS:
        prompt = f"Customer: {question.topic.questions[0].format(s=question.subject)}\nAgent:"
        wrong = next(value for value in question.topic.facts.values() if value != question.fact)
        for statement in question.topic.statements:
            assert gold(statement.format(s=question.subject, v=question.fact), prompt) == pytest.approx(1.0), statement
            assert gold(statement.format(s=question.subject, v=wrong), prompt) == pytest.approx(-1.0), statement


def test_shipped_data_is_what_the_script_makes():
    """The rows that the grammar alone decides come out the same again, in the same order."""
    assert shipped("demonstrations") == list(make.demonstrations(2000, seed=0))
    assert shipped("prompts") == list(make.prompts(1800, seed=0))
    pairs = shipped("preferences")
    assert pairs[: len(pairs) // 2] == [make.asdict(pair) for pair in make.written_pairs(len(pairs) // 2, seed=0)]


def test_label_noise_leaves_the_stated_accuracy():
    """The best reachable accuracy is between 0.85 and 0.92, and the labels agree with gold that often up to chance."""
    pairs = shipped("preferences")
    expected = make.best_reachable_accuracy(pairs)
    assert 0.85 < expected < 0.92
    agree = 0
    for pair in pairs:
        chosen, rejected = world.gold([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
        assert abs(chosen - rejected) >= make.NOTICED
        agree += chosen > rejected
    assert agree / len(pairs) == pytest.approx(expected, abs=3 * (0.25 / len(pairs)) ** 0.5)


def test_annotators_follow_bradley_and_terry():
    """A preference's probability is the logistic function of the gold difference over the annotator's temperature."""
    assert make.preference_probability(1.0, 1.0, "hasty") == 0.5
    assert make.preference_probability(1.0, 0.0, "careful") == pytest.approx(0.98201, abs=1e-5)  # 1 / (1 + e^-4)
    assert make.preference_probability(0.0, 1.0, "careful") == pytest.approx(0.01799, abs=1e-5)


def test_shipped_files_are_small():
    """The checkpoint folder is below 6 MB and the data below 2 MB."""
    size = {name: sum(file.stat().st_size for file in (make.HERE / name).iterdir()) for name in ("checkpoint", "data")}
    assert size["checkpoint"] < 6e6
    assert size["data"] < 2e6


def test_checkpoint_stores_its_embeddings():
    """The tied embedding is stored under its own name, so that a sequence classifier loads it too."""
    from safetensors import safe_open

    with safe_open(make.HERE / "checkpoint" / "model.safetensors", "np") as file:
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118  (a safetensors file is no mapping)


def test_prompt_and_answer_tokenise_apart():
    """A prompt's tokens are a prefix of the tokens of prompt and completion, and every shipped row fits the context."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(make.HERE / "checkpoint" / "tokenizer.json"))
    for row in shipped("demonstrations")[:300]:
        prompt = tokenizer.encode(row["prompt"]).ids
        both = tokenizer.encode(row["prompt"] + row["completion"]).ids
        assert both[: len(prompt)] == prompt
        assert tokenizer.decode(both) == row["prompt"] + row["completion"]
        assert len(both) < 128


def test_world_is_light():
    """Importing the world imports no torch."""
    code = "import sys, rlhf_kit.quickstart.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
