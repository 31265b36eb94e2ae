"""PPO here and in trl 1.12.0, the last release that has a PPO trainer: completions per second and peak memory, in turn.

    python benchmarks/ppo_vs_trl.py            both sizes, both workloads, 5 pairs each (hours)
    python benchmarks/ppo_vs_trl.py --quick    the smaller size, 2 pairs of each workload (minutes)

Both get the same random base, LoRA rank, prompts, lengths, batch, PPO epochs, optimizer steps, dtype and threads, and
run as processes of their own, one after the other, in turn. A step's time is the time between the ends of two steps,
seen from outside; memory is the process's peak less that of a process that only imports the same libraries.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from measure import ROOT, arguments, install_trl, print_table, write

RANK = 16
END, PAD = 0, 1  # token ids
DIFFERENCES = """\
What differs, trl 1.12.0 against rlhf_kit:
  value function    a second model, all of it trained     | an adapter, or a head on states that are there
  reward model      a third model                         | an adapter
  random numbers    one for each entry of the vocabulary  | one for each token
  log-probabilities from the logits of generation (kept)  | from a pass over the completions
  also computed     entropy of every token in learning    | KL in both directions"""


@dataclass(frozen=True)
class Shape:
    """A model and the work on it."""

    config: dict[str, int]
    prompt: int
    completion: int
    batch: int
    epochs: int
    steps: int
    """Of each process; the first warms up."""

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's linear maps: q, k, v, o, gate, up, down."""
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"]
        kv = self.config["num_key_value_heads"] * hidden // self.config["num_attention_heads"]
        return [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), *2 * [(hidden, inner)], (inner, hidden)]

    @property
    def head_parameters(self) -> int:
        """Of the output head, which every completion token passes once."""
        return self.config["hidden_size"] * self.config["vocab_size"]


SHAPES = {
    "15m": Shape(
        {
            "hidden_size": 288,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "vocab_size": 32_000,
        },
        prompt=32,
        completion=48,
        batch=32,
        epochs=4,
        steps=3,
    ),
    "135m": Shape(
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49_152,
        },
        prompt=64,
        completion=64,
        batch=8,
        epochs=2,
        steps=2,
    ),
}


# ---------------------------------------------------------------- the same base, prompts and recipe for both


def write_base(folder: Path, shape: Shape, architecture: str, end_probability: float) -> None:
    """Write a random checkpoint that ends a completion with a fixed probability a token, and its tokenizer.

    Dimension 0 of the residual stream is the same constant for every token and no layer writes to it, so the end
    token's logit, which reads nothing else, is set by one weight.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(
        architecture,
        **shape.config,
        max_position_embeddings=shape.prompt + shape.completion,
        tie_word_embeddings=True,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 1.0
        embedding[[END, PAD]] = 0.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        ids = torch.randint(3, shape.config["vocab_size"], (8, shape.prompt))
        states = model.model(ids).last_hidden_state[:, -1]
        others = model.lm_head(states)[:, 2:].logsumexp(-1).mean()
        for token, probability in ((END, end_probability), (PAD, 0.0)):
            odds = torch.tensor(probability / (1 - probability)).clamp(min=1e-12)
            embedding[token, 0] = (others + odds.log()) / states[:, 0].mean()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, PAD
    model.save_pretrained(folder)
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = dict.fromkeys(special.values()) | dict.fromkeys(f"t{n}" for n in range(3, shape.config["vocab_size"]))
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def prepare(folder: Path, shape: Shape, architecture: str, workload: str) -> None:
    """Write everything that both sides need into `folder`, and take our SFT and reward stages one step."""
    import torch
    import yaml

    end_probability = 0.0 if workload == "fixed" else 1 / (0.6 * shape.completion)
    write_base(folder / "model", shape, architecture, end_probability)
    generator = torch.Generator().manual_seed(1)

    def text(tokens: int) -> str:
        return " ".join(f"t{n}" for n in torch.randint(3, 1000, (tokens,), generator=generator).tolist())

    prompts = [text(shape.prompt) for _ in range(4 * shape.batch)]
    pairs = [{"prompt": p, "chosen": " " + text(8), "rejected": " " + text(8)} for p in prompts[:40]]
    demonstrations = [{"prompt": p, "completion": " " + text(8)} for p in prompts[:40]]
    for kind, rows, more in (
        ("prompts", [{"prompt": p} for p in prompts], "heldout: held.jsonl"),
        ("preferences", pairs, "heldout: 0.2"),
        ("demonstrations", demonstrations, "heldout: 0"),
    ):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        card = f"---\nrlhf_kit:\n  kind: {kind}\n  source: {kind}.jsonl\n  {more}\n---\nRandom tokens.\n"
        (folder / f"{kind}.md").write_text(card)
    (folder / "held.jsonl").write_text(json.dumps({"prompt": text(shape.prompt)}) + "\n")
    short = {"max_steps": 1, "batch_size": 8, "microbatch": 8}
    recipe = {
        "name": "ppo_vs_trl",
        "base": {"model": "model", "dtype": "float32"},
        "adapter": {"r": RANK, "alpha": RANK},
        "stages": {
            "sft": {"kind": "sft", "data": "demonstrations.md", **short},
            "reward": {"kind": "reward", "init": "sft", "data": "preferences.md", **short},
            "ppo": {
                "kind": "ppo",
                "policy": "sft",
                "reward": "reward",
                "prompts": "prompts.md",
                "kl_coef": 0.05,
                "updates": shape.steps,
                "batch_size": shape.batch,
                "microbatch": shape.batch,  # as trl, where rows that learn together pass together
                "minibatches": 1,
                "epochs": shape.epochs,
                "max_new_tokens": shape.completion,
                "learning_rate": 1e-6,
                "samples_every": 1_000_000,
                "checkpoint_every": {"updates": None, "minutes": None},
            },
        },
        "evaluation": {"count": 1, "batch_size": 1, "max_new_tokens": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "rlhf_kit", "run", "recipe.yaml", "--out", "run", "--only"]
    for stage in ("sft", "reward"):
        watch([*command, stage], folder, environment())


# ---------------------------------------------------------------- one process, seen from outside


def environment(*paths: Path) -> dict[str, str]:
    """Return the environment of a measured process; `paths` come first where it looks for modules."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])), "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Seen:
    """What was seen of a process."""

    ends: list[float]
    """When each step ended, in seconds."""
    peak: int
    """Bytes."""
    lines: list[str]
    cpu: list[float]
    """Seconds of CPU time that the process had taken when each step ended."""

    @property
    def step_seconds(self) -> float:
        """Mean time of a step after the first."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def watch(command: list[str], folder: Path, env: dict[str, str]) -> Seen:
    """Run a process that writes "... step N ..." at the end of each step."""
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    ends, cpu, lines = [], [], []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if re.match(r"(ppo|reward|trl) step \d+ ", line):
            ends.append(time.monotonic())
            cpu.append(cpu_seconds(process.pid))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("".join(lines[-40:]))
    return Seen(ends, usage.ru_maxrss * 1024, lines, cpu)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time a process has taken, where the system tells, else NaN."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return math.nan
    user, system = path.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def ours(folder: Path, value: str) -> Seen:
    """Run our PPO stage with a kind of value function."""
    command = [sys.executable, "-m", "rlhf_kit", "run", "recipe.yaml", "--out", "run", "--only", "ppo", "--fresh"]
    return watch([*command, "--set", f"stages.ppo.value={value}"], folder, environment())


def theirs(folder: Path, trl: Path) -> Seen:
    """Run trl's trainer."""
    return watch([sys.executable, __file__, "--trl-worker", str(folder)], folder, environment(trl))


def imports_only(code: str, *paths: Path) -> int:
    """Return the peak memory, in bytes, of a process that imports and does nothing else."""
    return watch([sys.executable, "-c", code], ROOT, environment(*paths)).peak


def trl_worker(folder: Path) -> None:
    """Take the steps with trl's trainer, on the files of `prepare`."""
    import yaml
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    settings = yaml.safe_load((folder / "recipe.yaml").read_text())["stages"]["ppo"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    dataset = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):  # type: ignore[no-untyped-def]
            print(f"trl step {state.global_step} {json.dumps(logs)}", flush=True)

    def classifier():  # type: ignore[no-untyped-def]
        return AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype="float32")

    with tempfile.TemporaryDirectory() as out:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=out,
                per_device_train_batch_size=settings["batch_size"],
                gradient_accumulation_steps=1,
                num_mini_batches=settings["minibatches"],
                num_ppo_epochs=settings["epochs"],
                total_episodes=settings["updates"] * settings["batch_size"],
                response_length=settings["max_new_tokens"],
                local_rollout_forward_batch_size=settings["batch_size"],
                stop_token="eos",
                temperature=1.0,
                kl_coef=settings["kl_coef"],
                learning_rate=settings["learning_rate"],
                gradient_checkpointing=False,  # its default, True, is no faster
                num_sample_generations=0,
                bf16=False,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
            ref_model=None,  # the policy without its adapter
            reward_model=classifier(),
            value_model=classifier(),
            train_dataset=dataset,
            eval_dataset=dataset,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear"
            ),
            callbacks=[Report()],
        )
        trainer.train()


# ---------------------------------------------------------------- the arithmetic behind a step


def matmul_rate() -> float:
    """Return the FLOP/s that a plain float32 matmul reaches here and now."""
    code = (
        "import time, torch\n"
        "a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)\n"
        "a @ b\n"
        "best = 1e9\n"
        "for _ in range(8):\n"
        "    start = time.perf_counter(); a @ b; best = min(best, time.perf_counter() - start)\n"
        "print(2 * 2048**3 / best)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(result.stdout)


def least_flops(shape: Shape, length: float, value: str) -> dict[str, float]:
    """Return the FLOPs that each phase of our step needs at least: 2 x parameters touched x tokens, each role counted.

    length: mean completion tokens. A backward pass costs as much as the forward pass through frozen weights, less what
    nobody asks for (the gradients by the inputs of the lowest q, k and v), and twice as much through an adapter. The
    value adapter learns in one of the epochs. The policy's pass that learning begins with is made in scoring, together
    with the log-probabilities' gradients.
    """
    layers, tokens = shape.config["num_hidden_layers"], shape.batch * (shape.prompt + length)
    frozen = 2 * tokens * layers * sum(inputs * outputs for inputs, outputs in shape.matrices)
    lora = 2 * tokens * layers * sum(RANK * (inputs + outputs) for inputs, outputs in shape.matrices)
    lowest = 2 * tokens * sum(inputs * outputs for inputs, outputs in shape.matrices[:3])
    head = 2 * shape.batch * length * shape.head_parameters
    forward, both_ways = frozen + lora, 2 * frozen - lowest + 3 * lora
    own_value = value == "adapter"
    return {
        "generate": forward + head,
        "score": (3 + own_value) * forward + 3 * head,  # policy, reference, reward (and value)
        "learn": shape.epochs * (both_ways + 2 * head) - forward - 2 * head + own_value * both_ways,
    }


# ---------------------------------------------------------------- the table


def compare(
    shape: Shape, folder: Path, trl: Path, pairs: int, values: Sequence[str], base: tuple[int, int]
) -> list[dict[str, Any]]:
    """Return the medians over pairs of runs for each value function; base: bytes that importing each side takes.

    The runs take turns: trl's, then ours with each value function, and again.
    """
    rows: dict[str, list[dict[str, float]]] = {value: [] for value in values}
    for _ in range(pairs):
        their = theirs(folder, trl)
        for value in values:
            rate = matmul_rate()
            rows[value].append(figures(shape, folder, value, ours(folder, value), their, rate, base))
            print_table([{"value": value, **rows[value][-1]}])
    return [
        {"value": value, **{name: median(row[name] for row in rows[value]) for name in rows[value][0]}}
        for value in values
    ]


def figures(
    shape: Shape, folder: Path, value: str, our: Seen, their: Seen, rate: float, base: tuple[int, int]
) -> dict[str, float]:
    """Return what a pair of runs gives; `rate` is the FLOP/s of a plain matmul beside it."""
    steps = [json.loads(line) for line in (folder / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()][1:]
    length = fmean(step["rollout/length"] for step in steps)
    least = least_flops(shape, length, value)
    seconds = {
        "generate": fmean(step["time/rollout_s"] - step["time/scoring_s"] for step in steps),
        "score": fmean(step["time/scoring_s"] for step in steps),
        "learn": fmean(step["time/update_s"] for step in steps),
    }
    return {
        "speed": their.step_seconds / our.step_seconds,
        "memory": (our.peak - base[0]) / (their.peak - base[1]),
        "ours s": our.step_seconds,
        "trl s": their.step_seconds,
        "ours GB": (our.peak - base[0]) / 1e9,
        "trl GB": (their.peak - base[1]) / 1e9,
        "length": length,
        **{f"{name} s": value for name, value in seconds.items()},
        **{f"{name} share": least[name] / seconds[name] / rate for name in least},
    }


def main() -> None:
    """Run the pairs and print their medians."""
    options = arguments(__doc__ or "")
    options.add_argument("--trl-worker", type=Path, help="for this script itself")
    options.add_argument("--sizes", nargs="+", choices=SHAPES)
    options.add_argument("--workloads", nargs="+", choices=("fixed", "natural"), default=["fixed", "natural"])
    options.add_argument("--values", nargs="+", choices=("adapter", "trunk"), default=["adapter", "trunk"])
    options.add_argument("--architecture", choices=("llama", "qwen2"), default="llama")
    options.add_argument("--pairs", type=int)
    chosen = options.parse_args()
    if chosen.trl_worker:
        trl_worker(chosen.trl_worker)
        return
    sizes = chosen.sizes or (["15m"] if chosen.quick else list(SHAPES))
    pairs = chosen.pairs or (2 if chosen.quick else 5)
    results = []
    with tempfile.TemporaryDirectory() as name:
        trl = install_trl(Path(name) / "trl")
        base = (
            imports_only("import rlhf_kit.pipeline, rlhf_kit.stages.ppo"),
            imports_only("from trl.experimental.ppo import PPOTrainer; import peft, datasets", trl),
        )
        print(DIFFERENCES)
        for size in sizes:
            for workload in chosen.workloads:
                folder = Path(name) / f"{size}-{workload}"
                folder.mkdir()
                prepare(folder, SHAPES[size], chosen.architecture, workload)
                print(f"\n{size} {workload}: each pair, then the medians", flush=True)
                found = compare(SHAPES[size], folder, trl, pairs, chosen.values, base)
                print_table(found)
                results += [{"size": size, "workload": workload, **row} for row in found]
    print()
    print_table(results)
    write(chosen.json, {"architecture": chosen.architecture, "pairs": pairs, "rows": results})


if __name__ == "__main__":
    main()
