"""Several cards for one stage: weights, caps, and nothing on both sides of the split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from rlhf_kit.check import check_recipe, plan
from rlhf_kit.data_cards import load_card
from rlhf_kit.errors import InputError
from rlhf_kit.examples.loading import Share as Part
from rlhf_kit.examples.loading import load_examples, mixed
from rlhf_kit.marked_yaml import write_yaml
from rlhf_kit.recipe import Portion, resolved_yaml
from rlhf_kit.recipe_reading import load_recipe
from tests.plain import RECIPE, make_workplace, write_jsonl


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a recipe without a fault and a second card of demonstrations, as the working directory."""
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    card(0.1, "more", [{"prompt": f"M{n}?", "completion": "B"} for n in range(200)])
    return tmp_path


def card(heldout: object, name: str, rows: list[dict], kind: str = "demonstrations") -> str:
    write_jsonl(Path(f"{name}.jsonl"), rows)
    block = {"kind": kind, "source": f"{name}.jsonl", "heldout": heldout}
    Path(f"{name}.md").write_text(f"---\n{write_yaml({'rlhf_kit': block})}---\n")
    return f"{name}.md"


def load(*arguments: object, **named: str):
    return load_examples(load_card(card(*arguments, **named)))


def write_recipe(data: str, stage: str = "sft") -> None:
    """Write the recipe with other cards for a stage."""
    old = {"sft": "data: shown.md", "reward": "data: pairs.md", "ppo": "prompts: asked.md"}[stage]
    Path("recipe.yaml").write_text(RECIPE.replace(old, f"{old.split()[0]} {data}"))


class TestMixed:
    def test_weights_and_caps(self, workplace):
        """Whole parts of a weight repeat every row, the rest a share of them; a cap keeps so many; all is counted."""
        one = load(0, "one", [{"prompt": f"O{n}", "completion": "A"} for n in range(400)])
        two = load(0, "two", [{"prompt": f"T{n}", "completion": "A"} for n in range(300)])
        found = mixed([Part(one, 2.25, None), Part(two, 0.5, 100)])
        times = Counter(row.prompt for row in found.train)
        first = [times[row.prompt] for row in one.train]
        assert set(first) == {2, 3} and 70 < first.count(3) < 130  # a quarter of 400: 100 and 3.5 standard deviations
        second = [times[row.prompt] for row in two.train]
        assert set(second) == {0, 1} and sum(second) < 70 and second.count(0) > 200  # half of the 100 under the cap
        counts = found.counts
        assert counts["read"] == 700 and counts["kept"] == len(found.train) == sum(times.values())
        assert counts["dropped: over the cap of two"] == 200
        assert counts["repeated: weight 2.25 of one"] == 400 + first.count(3)
        dropped = sum(number for what, number in counts.items() if what.startswith("dropped: "))
        repeated = sum(number for what, number in counts.items() if what.startswith("repeated: "))
        assert counts["kept"] - repeated + dropped == counts["read"]

    def test_what_is_taken_follows_from_the_rows(self, workplace):
        """The same rows in another order give the same choice."""
        rows = [{"prompt": f"O{n}", "completion": "A"} for n in range(50)]
        chosen = [
            {row.prompt for row in mixed([Part(load(0, "one", order), 0.5, 20)]).train} for order in (rows, rows[::-1])
        ]
        assert chosen[0] == chosen[1] and 0 < len(chosen[0]) < 20

    def test_a_prompt_held_out_in_one_card(self, workplace):
        """It is not trained on in another one, and counted."""
        rows = [{"prompt": f"O{n}", "completion": "A"} for n in range(40)]
        one = load(0.3, "one", rows)
        two = load(0, "two", rows)
        found = mixed([Part(one, 1, None), Part(two, 1, None)])
        held = {row.prompt for row in found.heldout}
        assert held and not held & {row.prompt for row in found.train}
        assert found.counts["dropped: prompt is also held out"] == len(held)

    def test_the_hash_tells_mixtures_apart(self, workplace):
        """Another weight, cap or card is another content."""
        one = load(0, "one", [{"prompt": f"O{n}", "completion": "A"} for n in range(9)])
        hashes = {mixed([Part(one, weight, cap)]).content_hash for weight, cap in ((1, None), (2, None), (1, 5))}
        assert len(hashes) == 3
        assert mixed([Part(one, 1, None)]).content_hash == one.content_hash


class TestRecipes:
    def test_a_list_of_cards(self, workplace):
        """It is read, written out with every default, and planned with all its rows."""
        write_recipe("[{card: shown.md}, {card: more.md, weight: 0.5, cap: 100}]")
        recipe = load_recipe("recipe.yaml")
        cards = recipe.stages["sft"].data
        assert cards == (Portion(card="shown.md"), Portion(card="more.md", weight=0.5, cap=100))
        Path("again.yaml").write_text(resolved_yaml(recipe))
        assert load_recipe("again.yaml").stages == recipe.stages
        made = plan(recipe)
        assert set(made.examples) == {"shown.md", "more.md", "pairs.md", "asked.md", cards}
        train = len(made.examples[cards].train)
        assert any(f"{train:,} rows x 1 epochs" in line for line in check_recipe(recipe))
        assert made.examples[cards].card.name == "shown + more"
        mixture = made.lines.index(next(line for line in made.lines if line.startswith("mixture  shown.md + more.md")))
        assert f"{train:,} rows to train on" in made.lines[mixture]
        assert any("left out: " in line and "cap of more" in line for line in made.lines[mixture + 1 :])

    def test_a_name_alone_is_a_card(self, workplace):
        """Without weight and cap."""
        write_recipe("[shown.md, {card: more.md, cap: 100}]")
        cards = load_recipe("recipe.yaml").stages["sft"].data
        assert cards == (Portion(card="shown.md"), Portion(card="more.md", cap=100))

    def test_pairs_and_rankings(self, workplace):
        """They mix: a pair is a ranking of two."""
        rows = [{"prompt": f"R{n}", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]} for n in range(4)]
        write_jsonl(Path("ranked.jsonl"), rows)
        Path("ranked.md").write_text("---\nrlhf_kit: {kind: rankings, source: ranked.jsonl}\n---\n")
        write_recipe("[pairs.md, {card: ranked.md, weight: 2}]", "reward")
        recipe = load_recipe("recipe.yaml")
        found = plan(recipe).examples[recipe.stages["reward"].data]
        assert {type(row).__name__ for row in found.train} == {"Preference", "Ranking"}
        assert any("rows x" in line for line in check_recipe(recipe) if "reward: reward" in line)

    def test_prompts_of_several_kinds(self, workplace):
        """Prompts are taken from each card, each once."""
        write_recipe("[{card: asked.md}, {card: more.md, cap: 10}]", "ppo")
        recipe = load_recipe("recipe.yaml")
        found = plan(recipe).examples[recipe.stages["ppo"].prompts]
        assert sum(row.prompt.startswith("M") for row in found.train) == 10
        assert {type(row).__name__ for row in found.train} == {"PromptRow"}

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            ("[]", "stages.sft.data: must be text; seen a list"),
            ("[{card: no.md}]", "stages.sft.data[0].card: there is no data card no.md"),
            ("[{crad: shown.md}]", "stages.sft.data[0].crad: unknown key; did you mean card?"),
            ("[{weight: 2}]", "stages.sft.data[0].card: missing, and has no default: a data card"),
            ("[{card: shown.md, weight: 0}]", "stages.sft.data[0].weight: must be more than 0; seen 0"),
            ("[3]", "stages.sft.data[0]: must be a mapping; seen"),
            ("[no.md]", "stages.sft.data[0].card: there is no data card no.md"),
            ("3", "stages.sft.data: must be text; seen 3"),
        ],
    )
    def test_what_is_no_list_of_cards(self, workplace, data, said):
        """One message with the line."""
        write_recipe(data)
        with pytest.raises(InputError) as caught:
            load_recipe("recipe.yaml")
        assert len(caught.value.problems) == 1 and said in str(caught.value)

    @pytest.mark.parametrize(
        ("stage", "data", "said"),
        [
            ("sft", "[{card: shown.md}, {card: shown.md}]", "stages.sft.data: names a card twice"),
            ("sft", "[{card: shown.md}, {card: pairs.md}]", "needs a card of demonstrations or text; pairs.md has"),
            ("ppo", "[{card: asked.md, weight: 2}]", "stages.ppo.prompts: a prompt is there once"),
        ],
    )
    def test_what_does_not_go_together(self, workplace, stage, data, said):
        """Said by check."""
        write_recipe(data, stage)
        with pytest.raises(InputError) as caught:
            check_recipe(load_recipe("recipe.yaml"))
        assert said in str(caught.value)
