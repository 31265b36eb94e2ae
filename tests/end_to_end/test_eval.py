"""`rlhf-kit eval`: what it measures is what is there, the same again the next time, and people and models may judge."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from rlhf_kit import load
from rlhf_kit.comparison import Asked, Comparison, interpolated, powers_of_two
from rlhf_kit.finished import FinishedRun
from tests import tiny
from tests.end_to_end import chain

FEW = ("--best-of", "4", "--best-of-prompts", "3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the tiny chain."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = chain.write_chain(folder, evaluation={"gold": "tests.end_to_end.chain:vowels"})
    chain.run_chain(recipe, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def measured(finished):
    ended = chain.run("eval", str(finished), *FEW)
    assert ended.returncode == 0, ended.stderr
    return json.loads((finished / "eval.json").read_text()), ended.stdout


def test_it_agrees_with_the_closing_table(finished, measured):
    """Same prompts, same random numbers, same scorers: the means of `summary.json` are there again."""
    found, printed = measured
    summary = json.loads((finished / "summary.json").read_text())
    assert found["systems"].keys() == {"base", "sft", "ppo"} and found["verdict"] == "gold"
    for name, figures in summary["systems"].items():
        for key, value in figures.items():
            assert found["systems"][name][key] == pytest.approx(value, abs=1e-5)
    assert found["win_rate"]["ppo/sft"]["rate"] == pytest.approx(summary["win_rate"]["ppo/sft"]["rate"])
    assert found["win_rate"].keys() == {"sft/base", "ppo/sft"}
    assert "ppo wins over sft" in printed and "best of n of sft" in printed


def test_best_of_n_is_of_draws_of_each_prompt(finished, measured):
    """Whatever is sampled together: each draw has its own numbers, and a prompt's are compared with one another."""
    comparison = Comparison(FinishedRun(finished), Asked(best_of=4, best_of_prompts=3))
    some = comparison.examination.rows(range(3))
    scores, lengths = [], []
    for draw in range(4):
        rollout, written = some.sampled(some.reference, some.uniforms("best of n", draw))
        scores.append(some.scores(written, some.reference))
        lengths.append(rollout.completion_mask.sum(1).tolist())
    best = [max(range(4), key=lambda draw, row=row: scores[draw][row]) for row in range(3)]
    (last,) = (point for point in measured[0]["best_of_n"]["points"] if point["n"] == 4)
    assert last["score"] == pytest.approx(sum(scores[draw][row] for row, draw in enumerate(best)) / 3, abs=1e-4)
    assert last["length"] == pytest.approx(sum(lengths[draw][row] for row, draw in enumerate(best)) / 3)


def test_the_figures_are_those_of_the_answers(measured):
    found, _ = measured
    for figures in found["systems"].values():
        for name in ("ended", "repetition", "distinct_1", "distinct_2", "refusals"):
            assert 0 <= figures[name] <= 1
        assert figures["reference_perplexity"] > 1
    assert found["systems"]["sft"]["kl"] == found["systems"]["sft"]["kl_k3"] == 0  # it is the reference
    points = found["best_of_n"]["points"]
    assert [point["n"] for point in points] == [1, 2, 4]
    scores = [point["score"] for point in points]
    assert scores == sorted(scores)
    assert found["frontier"].keys() == {"ppo"} and found["frontier"]["ppo"]["verdict"] == "gold"


def test_perplexity_is_that_of_the_model(finished, measured):
    """On the demonstrations that the SFT stage held out, computed anew with the loaded model's own loss."""
    found, _ = measured
    from rlhf_kit.collate import load_text_format, tokenise_demonstrations
    from rlhf_kit.data_cards import load_card
    from rlhf_kit.examples.loading import load_examples
    from rlhf_kit.recipe_reading import written_recipe

    recipe = written_recipe(finished / "recipe.resolved.yaml")
    rows = tokenise_demonstrations(
        load_examples(load_card(recipe.stages["sft"].data)).heldout, load_text_format(recipe.base), None, "drop"
    ).rows
    model, _ = load(finished, "ppo")
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            labels = torch.tensor([row["labels"]])
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
            count = int((labels[:, 1:] != -100).sum())
            total, tokens = total + float(loss) * count, tokens + count
    assert found["text"]["rows"] == len(rows) and found["text"]["heldout"]
    assert found["text"]["perplexity"]["ppo"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert found["text"]["change"]["sft"] == 0


def test_the_same_again(finished, measured):
    """Byte by byte, whatever the batch; and of chosen systems alone."""
    before = (finished / "eval.json").read_bytes()
    assert chain.run("eval", str(finished), *FEW).returncode == 0
    assert (finished / "eval.json").read_bytes() == before
    ended = chain.run("eval", str(finished), *FEW, "--stages", "sft,ppo", "--batch-size", "3")
    assert ended.returncode == 0, ended.stderr
    again = json.loads((finished / "eval.json").read_text())
    assert again["systems"].keys() == {"sft", "ppo"}
    assert again["systems"]["ppo"]["score"] == pytest.approx(measured[0]["systems"]["ppo"]["score"], abs=1e-5)


def test_people_judge_blind_pairs(finished, tmp_path):
    """Who is `a` is not told; verdicts for the longer answer give the rate at which each system's is longer."""
    pairs, verdicts = tmp_path / "pairs.jsonl", tmp_path / "verdicts.jsonl"
    ended = chain.run("eval", str(finished), "--best-of", "1", "--stages", "sft,ppo", "--pairs", str(pairs))
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    said = [{"id": row["id"], "preferred": preferred(row)} for row in rows]
    verdicts.write_text("".join(json.dumps(row) + "\n" for row in said))
    ended = chain.run("eval", str(finished), "--best-of", "1", "--stages", "sft,ppo", "--human", str(verdicts))
    assert ended.returncode == 0, ended.stderr
    judged = json.loads((finished / "eval.json").read_text())["judge"]["ppo/sft"]
    assert judged["prompts"] == len(rows)
    answers = {tuple(sorted((row["a"], row["b"]))): preferred(row) for row in rows}
    assert len(answers) > 0 and 0 <= judged["rate"] <= 1
    assert judged["ties"] == pytest.approx(sum(row["preferred"] == "tie" for row in said) / len(said))
    stale = tmp_path / "stale.jsonl"
    stale.write_text(json.dumps({"id": "0123456789abcdef", "preferred": "a"}) + "\n")
    ended = chain.run("eval", str(finished), "--best-of", "1", "--human", str(stale))
    assert ended.returncode == 2 and "on answers that these systems do not give" in ended.stderr
    stale.write_text(json.dumps({"id": "x", "preferred": "both"}) + "\n")
    ended = chain.run("eval", str(finished), "--best-of", "1", "--human", str(stale))
    assert ended.returncode == 2 and f"{stale}:1" in ended.stderr


def preferred(row: dict) -> str:
    return "tie" if len(row["a"]) == len(row["b"]) else "a" if len(row["a"]) > len(row["b"]) else "b"


def test_a_model_judges(finished, tmp_path):
    """Any local causal model; asked in both orders, so one that always says A has only ties."""
    judge = tiny.make_checkpoint(tmp_path / "judge", context=4096)
    ended = chain.run("eval", str(finished), "--best-of", "1", "--stages", "sft,ppo", "--judge", str(judge))
    assert ended.returncode == 0, ended.stderr
    judged = json.loads((finished / "eval.json").read_text())["judge"]
    assert 0 <= judged["ppo/sft"]["rate"] <= 1
    assert judged["ppo/sft"]["ties"] == pytest.approx(1 - judged["ppo/sft"]["consistent"])


def test_another_run_joins(finished, tmp_path):
    """On the same base; its newest policy is compared with ours, and equals ours where it is a copy."""
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    ended = chain.run("eval", str(finished), *FEW, "--against", str(other))
    assert ended.returncode == 0, ended.stderr
    found = json.loads((finished / "eval.json").read_text())
    (name,) = found["systems"].keys() - {"base", "sft", "ppo"}
    assert found["systems"][name] == found["systems"]["ppo"]
    assert found["win_rate"][f"ppo/{name}"]["rate"] == 0.5 and found["win_rate"][f"ppo/{name}"]["ties"] == 1


def test_the_reward_model_on_other_pairs(finished, tmp_path):
    """As `rlhf-kit score` has it, by subset; of the pairs that it was trained on the held-out ones alone."""
    rows = [{**row, "subset": "even" if n % 2 == 0 else "odd"} for n, row in enumerate(tiny.preferences())]
    other = tiny.write_card(
        tmp_path, "bench", "preferences", [{**row, "chosen": row["chosen"] + " x"} for row in rows], slices=["subset"]
    )
    trained = finished.parent / "pairs.md"
    arguments = ("--preferences", str(other), "--preferences", str(trained))
    ended = chain.run("eval", str(finished), "--best-of", "1", "--stages", "sft,ppo", *arguments)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((finished / "eval.json").read_text())["reward_sets"]
    assert found["bench"]["pairs"] == len(rows)
    assert sum(part["pairs"] for part in found["bench"]["slices"]["subset"].values()) == len(rows)
    health = json.loads((finished / "reward" / "manifest.json").read_text())["health"]
    assert found["pairs"]["pairs"] == health["pairs"] and found["pairs"]["accuracy"] == health["accuracy"]
    assert found["pairs"]["calibration"]["error"] == pytest.approx(health["calibration"]["error"], abs=1e-5)
    answers = tmp_path / "answers.jsonl"
    sides = [
        {"prompt": row["prompt"], "completion": row[side] + " x" * (side == "chosen")}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    answers.write_text("".join(json.dumps(row) + "\n" for row in sides))
    scored = chain.run("score", str(finished), str(answers))
    scores = [json.loads(line)["score"] for line in scored.stdout.splitlines()]
    right = sum(
        (better > worse) + (better == worse) / 2 for better, worse in zip(scores[::2], scores[1::2], strict=True)
    )
    assert found["bench"]["accuracy"] == pytest.approx(right / len(rows))


TASK = """
task: where_things_are
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_tasks_of_the_harness(finished, tmp_path):
    """On one base: the accuracies are those of the log-probabilities that the loaded models give."""
    rows = [
        {"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in tiny.preferences()[:12]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "where.yaml"
    task.write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    arguments = ("--best-of", "1", "--stages", "base,ppo", "--tasks", str(task))
    ended = chain.run("eval", str(finished), *arguments)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((finished / "eval.json").read_text())["tasks"]["where_things_are"]
    assert "where_things_are" in ended.stdout
    model, tokenizer = load(finished, "ppo")

    def logprob(question, answer):
        asked = len(tokenizer(question)["input_ids"])
        ids = torch.tensor([tokenizer(question + answer)["input_ids"]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        return float(logprobs[range(asked - 1, ids.shape[1] - 1), ids[0, asked:]].sum())

    right = [logprob(row["question"], row["good"]) > logprob(row["question"], row["bad"]) for row in rows]
    assert found["ppo"]["acc"] == pytest.approx(sum(right) / len(right))
    assert found.keys() == {"base", "ppo"}
    ended = chain.run("eval", str(finished), "--best-of", "1", "--tasks", "where_things_aer")
    assert ended.returncode == 2 and "lm-eval has no such task" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--stages", "sft,pppo"), "did you mean ppo?"),
        (("--stages", "ppo"), "a comparison has two systems or more"),
        (("--stages", "sft,reward"), "which writes nothing"),
        (("--judge", "x", "--human", "y"), "give one"),
        (("--human", "missing.jsonl"), "there is no such file"),
        (("--prompts", "missing.jsonl"), "there is no such file"),
        (("--against", "missing"), "missing"),
        (("--preferences", "a/pairs.md", "--preferences", "b/pairs.md"), "two cards are called pairs"),
    ],
)
def test_wrong_questions(finished, arguments, told):
    ended = chain.run("eval", str(finished), *arguments)
    assert ended.returncode == 2 and told in ended.stderr and "Traceback" not in ended.stderr


def test_curves_by_hand():
    assert powers_of_two(1) == [1] and powers_of_two(6) == [1, 2, 4, 6] and powers_of_two(8) == [1, 2, 4, 8]
    curve = [(0.0, 1.0), (1.0, 2.0), (3.0, 4.0)]
    assert [interpolated(curve, y) for y in (0.5, 1.5, 3.0, 5.0)] == [0.0, 0.5, 2.0, None]
