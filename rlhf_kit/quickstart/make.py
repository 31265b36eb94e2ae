"""Make everything the quickstart ships: checkpoint, tokenizer, demonstrations, preferences and prompts.

    python -m rlhf_kit.quickstart.make [--out FOLDER] [--data-only]

The corpus is the shop of `world.py` as it is: good and bad answers mixed, customers' reactions included. The
demonstrations are better but mixed too; the preferences come from simulated annotators who see the gold preference
through noise. About ten minutes on one core. The texts that the grammar alone decides are the same on every machine
for the same seed; the weights, and with them the answers sampled from the model (the second half of the preferences),
depend on how the machine rounds.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_kit.quickstart import world

HERE = Path(__file__).parent
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"

# How often each style of answer occurs: in the shop (pretraining), in the demonstrations, in what annotators compare.
IN_THE_SHOP = {
    "kind": 10,
    "brief": 12,
    "rude": 24,
    "evasive": 22,
    "rambling": 18,
    "wrong": 4,
    "repeated": 8,
    "gushing": 2,
}
DEMONSTRATED = {
    "kind": 15,
    "brief": 22,
    "rude": 20,
    "evasive": 17,
    "rambling": 15,
    "wrong": 3,
    "repeated": 6,
    "gushing": 2,
}
COMPARED = {"kind": 23, "brief": 22, "rude": 16, "evasive": 16, "rambling": 12, "wrong": 2, "repeated": 7, "gushing": 2}

# An annotator prefers a to b with probability sigmoid((gold(a) - gold(b)) / temperature).
# Two answers that differ by less than NOTICED look alike: the annotator skips them.
ANNOTATORS = {"careful": 0.25, "steady": 0.4, "hasty": 0.5, "tired": 0.7}
NOTICED = 0.25

VOCABULARY = 896  # a multiple of 64; the corpus has too few words for more than some 930
DOCUMENTS, STEPS, BATCH, LEARNING_RATE = 60_000, 1_200, 48, 3e-3
PAIRS = 5_000
SAMPLER_EPOCHS = 3  # of fine-tuning on the demonstrations before answers for the preferences are sampled
SAMPLER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: str
    rejected: str
    annotator: str


def document(rng: random.Random) -> str:
    """One text from the shop: a conversation, or a notice with facts."""
    if rng.random() < 0.3:
        return "Notice: " + " ".join(world.state(rng.choice(world.QUESTIONS), rng) for _ in range(5))
    turns = []
    for _ in range(rng.choice((1, 1, 2))):
        question = rng.choice(world.QUESTIONS)
        prompt, answer = world.ask(question, rng), world.answer(question, _style(IN_THE_SHOP, rng), rng)
        turns.append(f"{prompt} {answer}")
        if rng.random() < 0.5:
            turns.append(f"Customer: {_reaction(prompt, answer, rng)}")
    return "\n".join(turns)


def _reaction(prompt: str, answer: str, rng: random.Random) -> str:
    """What the customer says to an answer: from this the pretrained model learns to tell good answers from bad ones."""
    part = world.parts(prompt, answer)
    if part["fact"] == -1.0:
        return rng.choice(("No, that is wrong.", "That can not be right.", "I heard something else."))
    if part["rudeness"] < 0:
        return rng.choice(("There is no need to be rude.", "That is no way to talk to me."))
    if part["fact"] < 0:
        return rng.choice(("You did not answer my question.", "That does not help me."))
    if part["repetition"] < -0.1 or part["length"] < -0.3:
        return rng.choice(("That was a long answer.", "You could have said that in fewer words."))
    return rng.choice(("Thank you, that is right.", "Great, that helps a lot.", "Yes, just what I needed."))


def _style(shares: dict[str, int], rng: random.Random) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def demonstrations(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Distinct rows of a prompt and an answer of mixed quality."""
    rng = random.Random(f"demonstrations {seed}")
    seen: set[tuple[str, str]] = set()
    while len(seen) < count:
        question = rng.choice(world.QUESTIONS)
        row = world.ask(question, rng), " " + world.answer(question, _style(DEMONSTRATED, rng), rng)
        if row not in seen:
            seen.add(row)
            yield {"prompt": row[0], "completion": row[1]}


def prompts(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Distinct prompts."""
    rng = random.Random(f"prompts {seed}")
    seen: set[str] = set()
    while len(seen) < count:
        prompt = world.ask(rng.choice(world.QUESTIONS), rng)
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt}


def written_pairs(count: int, seed: int) -> Iterator[Pair]:
    """Labelled pairs of two answers that the grammar wrote."""
    rng = random.Random(f"preferences {seed}")
    while count:
        question = rng.choice(world.QUESTIONS)
        prompt = world.ask(question, rng)
        first, second = (" " + world.answer(question, _style(COMPARED, rng), rng) for _ in range(2))
        if pair := label(prompt, first, second, rng):
            count -= 1
            yield pair


def label(prompt: str, first: str, second: str, rng: random.Random) -> Pair | None:
    """The pair in the order that a random annotator prefers; None if the two answers look alike."""
    annotator = rng.choice(list(ANNOTATORS))
    first_gold, second_gold = world.gold([prompt, prompt], [first, second])
    if abs(first_gold - second_gold) < NOTICED:
        return None
    if rng.random() >= preference_probability(first_gold, second_gold, annotator):
        first, second = second, first
    return Pair(prompt, first, second, annotator)


def preference_probability(first_gold: float, second_gold: float, annotator: str) -> float:
    """Probability that the annotator prefers the first answer (Bradley and Terry 1952)."""
    return 1.0 / (1.0 + math.exp((second_gold - first_gold) / ANNOTATORS[annotator]))


def best_reachable_accuracy(pairs: Sequence[dict[str, str]]) -> float:
    """Expected accuracy of gold's own ordering of these pairs; no reward model can expect more under the noise."""
    total = 0.0
    for pair in pairs:
        chosen, rejected = world.gold([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
        p = preference_probability(chosen, rejected, pair["annotator"])
        total += max(p, 1.0 - p)
    return total / len(pairs)


# -------------------------------------------------------------------------------------------------------------- model


def make_tokenizer(documents: Sequence[str], folder: Path):
    """A byte-level BPE tokenizer of VOCABULARY entries that begins every text with BEGIN; saved in the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, bpe.token_to_id(BEGIN))]
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BEGIN, eos_token=END, model_max_length=256, padding_side="left"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(tokenizer, seed: int):
    """A Llama of 1.5 million parameters with random weights; every linear layer's width is a multiple of 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,  # the usual 0.02 starts slowly at this width
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(model, rows: list[tuple[list[int], int]], steps: int, learning_rate: float, seed: int) -> float:
    """Mean loss of the last tenth of the steps, nats per token; a row is its ids and how many of them are given."""
    import torch

    rng = random.Random(f"batches {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, (steps - step) / steps))
    losses: list[float] = []
    began = time.monotonic()
    for step, batch in enumerate(_batches(rows, steps, rng)):
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([[-100] * skip + ids[skip:] + [-100] * (width - len(ids)) for ids, skip in batch])
        loss = model(
            input_ids=input_ids, labels=labels
        ).loss  # padded on the right, so causal attention never sees the padding
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            say(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.monotonic() - began:.0f} s")
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _batches(
    rows: list[tuple[list[int], int]], steps: int, rng: random.Random
) -> Iterator[list[tuple[list[int], int]]]:
    """Random batches of rows of similar length."""
    made = 0
    while True:
        pool = sorted(rng.sample(rows, min(len(rows), 20 * BATCH)), key=lambda row: len(row[0]))
        chunks = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(chunks)
        for chunk in chunks:
            if made == steps:
                return
            made += 1
            yield chunk


def sample(model, tokenizer, texts: Sequence[str], seed: int, max_new_tokens: int = 64) -> list[str]:
    """One sampled completion for each prompt."""
    import torch

    torch.manual_seed(seed)
    model.eval()
    completions: list[str] = []
    for i in range(0, len(texts), 128):
        batch = tokenizer(list(texts[i : i + 128]), return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.no_grad():
            ids = model.generate(
                **batch,
                do_sample=True,
                temperature=SAMPLER_TEMPERATURE,
                top_k=0,
                max_new_tokens=max_new_tokens,
            )
        completions += tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return completions


def sampled_pairs(model, tokenizer, count: int, seed: int) -> Iterator[Pair]:
    """Labelled pairs of two answers that the model gave to one prompt."""
    rng = random.Random(f"sampled preferences {seed}")
    while count:
        texts = [world.ask(rng.choice(world.QUESTIONS), rng) for _ in range(count + 128)]
        first, second = (
            sample(model, tokenizer, texts, rng.getrandbits(31)),
            sample(model, tokenizer, texts, rng.getrandbits(31)),
        )
        for prompt, a, b in zip(texts, first, second, strict=True):
            if count and a.strip() and b.strip() and (pair := label(prompt, a, b, rng)):
                count -= 1
                yield pair


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    say(f"{path}: {len(rows)} rows, {path.stat().st_size} bytes")


def make_checkpoint(folder: Path, seed: int) -> None:
    """The corpus, a tokenizer and a model pretrained on it, the last two saved in the folder."""
    import torch

    rng = random.Random(f"corpus {seed}")
    documents = [document(rng) for _ in range(DOCUMENTS)]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(documents, folder)
    rows = [([*ids, tokenizer.eos_token_id], 0) for ids in tokenizer(documents).input_ids]
    tokens = sum(len(ids) for ids, _ in rows)
    model = make_model(tokenizer, seed)
    say(f"{len(documents)} documents, {tokens} tokens; {model.num_parameters()} parameters")
    began = time.monotonic()
    loss = train(model, rows, STEPS, LEARNING_RATE, seed)
    say(f"pretrained in {(time.monotonic() - began) / 60:.1f} minutes, loss {loss:.3f} nats per token")
    model.to(torch.bfloat16).save_pretrained(folder)
    card = MODEL_CARD.format(vocabulary=VOCABULARY, parameters=model.num_parameters(), tokens=tokens, loss=loss)
    (folder / "README.md").write_text(card, encoding="utf-8")


def make_data(folder: Path, checkpoint: Path, seed: int) -> None:
    """The three data files; half of the preferences compare answers sampled from the checkpoint after fine-tuning."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shown = list(demonstrations(2000, seed))
    write_rows(folder / "demonstrations.jsonl", shown)
    write_rows(folder / "prompts.jsonl", list(prompts(1800, seed)))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    ).train()
    rows = []
    for row in shown:
        prompt_ids = tokenizer(row["prompt"]).input_ids
        completion_ids = tokenizer(row["completion"], add_special_tokens=False).input_ids
        rows.append((prompt_ids + completion_ids + [tokenizer.eos_token_id], len(prompt_ids)))
    train(model, rows, SAMPLER_EPOCHS * len(rows) // BATCH, LEARNING_RATE / 10, seed)
    pairs = [*written_pairs(PAIRS // 2, seed), *sampled_pairs(model, tokenizer, PAIRS // 2, seed)]
    preferences = [asdict(pair) for pair in pairs]
    write_rows(folder / "preferences.jsonl", preferences)
    say(f"best reachable accuracy {best_reachable_accuracy(preferences):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=HERE, help="gets checkpoint/ and data/ (default: the package's own)"
    )
    parser.add_argument("--data-only", action="store_true", help="keep the checkpoint that is there")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.data_only:
        make_checkpoint(options.out / "checkpoint", options.seed)
    make_data(options.out / "data", options.out / "checkpoint", options.seed)


MODEL_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [rlhf_kit]
---
# The quickstart's base model

A Llama of {parameters:,} parameters (3 layers of width 192, 3 heads, context 256, vocabulary {vocabulary}, tied
embeddings) with a byte-level BPE tokenizer, stored in bfloat16. It was pretrained from random weights on {tokens:,}
tokens of conversations between customers and the agents of a shop that does not exist, to a loss of {loss:.2f} nats per
token. The conversations come from the grammar in `rlhf_kit/quickstart/world.py`; `python -m rlhf_kit.quickstart.make`
makes corpus, tokenizer and model again.

**Use.** To see supervised fine-tuning, a reward model and PPO work within minutes on a laptop, and to test code that
needs a pretrained checkpoint. A prompt looks like `Customer: How much is the mug?\\nAgent:`, its answer begins with
a space; there is no chat template. It knows nothing else.

**What to expect.** It talks as the shop does, unfiltered: agents are often rude, evasive or long-winded, sometimes
wrong, and it goes on with the customer's next turn after the answer. That is the point: it is what alignment starts
from.
"""


if __name__ == "__main__":
    main()
