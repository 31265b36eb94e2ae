"""The command line: thin verbs over the package. Results go to stdout, progress and logs to stderr.

Exit codes: 0 done; 2 the user's input is wrong; 75 stopped on a signal, run again to go on; 1 anything else.
torch and what needs it are imported inside the verbs, so that `--help` and `check` answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from rlhf_kit.errors import Diverged, InputError, Interrupted, NotPushed, NotScored, OutOfRoom, RequirementMissed

FAILED, INPUT_IS_WRONG, STOPPED = 1, 2, 75
ENDS = (InputError, Interrupted, Diverged, NotPushed, NotScored, OutOfRoom, RequirementMissed)
LIBRARIES = "accelerate|bitsandbytes|datasets|huggingface_hub|peft|tokenizers|torch|transformers|trl"

app = typer.Typer(
    name="rlhf-kit",
    help="SFT, a reward model and PPO as adapters on one frozen base, from one recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override one setting, e.g. stages.ppo.kl_coef=0.1. Repeatable."),
]


@app.command()
def run(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A YAML file, or hub://OWNER/NAME[@REVISION] to repeat a published run."),
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run directory; without it runs/<name of the recipe>.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run one stage; those before must be done.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew (with --only: that stage).")] = False,
) -> None:
    """Run the stages of a recipe; finished ones are skipped, an interrupted one goes on where it stopped."""
    from rich.console import Console

    from rlhf_kit import metrics, pipeline
    from rlhf_kit.closing import print_closing_table

    result = pipeline.run(recipe, overrides or (), out, only=only, fresh=fresh)
    if result.summary is not None and metrics.is_main_process():
        print_closing_table(result.recipe, result.folder, result.summary, Console())
    pipeline.leave()


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check recipe, data cards and data, and print the plan with every derived size. Loads no model."""
    from rlhf_kit.check import check_recipe
    from rlhf_kit.recipe_reading import load_recipe

    for line in check_recipe(load_recipe(recipe, overrides or [])):
        print(line)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
) -> None:
    """Tell what each stage will take in memory and time on this machine. Loads no model; takes seconds."""
    from rich.console import Console

    from rlhf_kit.forecast import forecast, print_forecast
    from rlhf_kit.recipe_reading import load_recipe

    _check_json_file(json_file)
    read = load_recipe(recipe, overrides or [])
    found = forecast(read)
    print_forecast(read, found, Console(highlight=False))
    if json_file is not None:
        json_file.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")


def _check_json_file(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise InputError(f"--json {path}: {'is a folder' if path.is_dir() else 'there is no such folder'}.")


data = typer.Typer(name="data", help="Look at data before anything is trained on it.", no_args_is_help=True)
app.add_typer(data)
CardFile = Annotated[Path, typer.Argument(metavar="CARD", help="The data card, a Markdown file.")]
BaseName = Annotated[
    str | None, typer.Option("--base", metavar="FOLDER_OR_ID", help="A checkpoint, or a recipe for its base.")
]


DataRoot = Annotated[
    Path | None, typer.Option("--data-root", metavar="DIR", help="Where to look for the card's files first.")
]


@data.command("check")
def check_data(
    card: CardFile,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
    base: BaseName = None,
    data_root: DataRoot = None,
) -> None:
    """Audit what a card yields: rows dropped and why, repetitions, conflicts, lengths, agreement, odd characters."""
    from rlhf_kit.audit import audit
    from rlhf_kit.audit_words import as_json, lines_of
    from rlhf_kit.data_cards import load_card

    found_card = load_card(card, data_root)
    _check_json_file(json_file)
    measured = None
    if base is not None:
        from rlhf_kit import preview as previews

        measured = previews.measured(previews.base_named(base))
    found = audit(found_card, measured)
    print("\n".join(lines_of(found)))
    if json_file is not None:
        json_file.write_text(as_json(found), encoding="utf-8")
    if found.problems:
        raise InputError(found.problems)


@data.command("preview")
def preview_data(
    card: CardFile,
    base: BaseName = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="How many rows.")] = 3,
    data_root: DataRoot = None,
) -> None:
    """Show rows as the model will see them, token by token, with what is learned from in colour."""
    from rich.console import Console

    from rlhf_kit import preview as previews
    from rlhf_kit.data_cards import load_card

    console = Console(soft_wrap=True, highlight=False)
    for line in previews.preview(load_card(card, data_root), rows, None if base is None else previews.base_named(base)):
        console.print(line)


@data.command("import")
def import_data(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A dataset_info.json of LLaMA-Factory.")],
    names: Annotated[list[str] | None, typer.Option("--name", metavar="NAME", help="One dataset. Repeatable.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the cards go.")] = Path("data_cards"),
) -> None:
    """Write a data card for each dataset that another tool's file describes."""
    from rlhf_kit.importing import import_cards

    cards, left_out = import_cards(file, names or [], out)
    for card in cards:
        print(card)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)


RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.")]


@app.command()
def report(run_dir: RunDir) -> None:
    """Write the report of a run, one self-contained page, and print where it is."""
    from rlhf_kit.report import write_report

    print(write_report(run_dir))


MovedBase = Annotated[
    str | None, typer.Option("--base", metavar="FOLDER_OR_ID", help="Where the base is now, if it has moved.")
]
Temperature = Annotated[float | None, typer.Option(min=1e-3, help="Without it, that of the run's PPO stage.")]
NewTokens = Annotated[int | None, typer.Option(min=1, help="Of an answer at most; without it, the PPO stage's.")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same answers.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows that pass through the model together.")]
RewardName = Annotated[str | None, typer.Option("--stage", metavar="STAGE", help="Without it, what PPO learnt from.")]


@app.command()
def chat(
    run_dir: RunDir,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="Or `base`; without it the last policy.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Beside what that stage started from.")] = False,
    plain: Annotated[
        bool | None, typer.Option("--plain/--dialogue", help="Each line is a whole prompt, or a turn of a dialogue.")
    ] = None,
    temperature: Temperature = None,
    max_new_tokens: NewTokens = None,
    seed: Seed = 0,
    base: MovedBase = None,
) -> None:
    """Talk to a policy of a run; its reward model scores each answer. /help lists what else can be typed."""
    from rich.console import Console

    from rlhf_kit import chat as chats
    from rlhf_kit.finished import FinishedRun
    from rlhf_kit.sampling import usual_settings

    found = FinishedRun(run_dir, base)
    name = stage or found.newest_policy()
    stages = [found.policy(one) for one in ([found.start_of(name), name] if compare else [name])]
    limit, usual = usual_settings(found)
    whole = chats.trained_on_texts(found) if plain is None else plain
    console = Console(soft_wrap=not compare, highlight=False)
    print(f"{' and '.join(stages)} of {run_dir}. /help lists commands.", file=sys.stderr)
    if whole:
        print("Each line is a whole prompt, as this run was trained on texts; \\n is a line break.", file=sys.stderr)
    talk = chats.Chat(
        found,
        found.reward_if_any(),
        [chats.Speaker(one) for one in stages],
        max_new_tokens or limit,
        temperature or usual,
        seed,
        whole,
        console,
    )
    talk.talk(chats.typed_lines(console))


@app.command()
def sample(
    run_dir: RunDir,
    prompts: Annotated[Path, typer.Option(metavar="FILE", help=".txt, a data file with `prompt`, or a data card.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the completions go, JSON lines.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Completions for each prompt.")] = 1,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="Or `base`; without it the last policy.")] = None,
    temperature: Temperature = None,
    max_new_tokens: NewTokens = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    base: MovedBase = None,
) -> None:
    """Write completions of a policy for a file of prompts, with the reward model's scores."""
    from rlhf_kit import artifacts, sampling
    from rlhf_kit.finished import FinishedRun

    artifacts.check_new_file(out)
    found = FinishedRun(run_dir, base)
    asked = sampling.read_prompts(prompts)
    limit, usual = sampling.usual_settings(found)
    written = sampling.sampled(
        found,
        found.policy(stage or found.newest_policy()),
        asked,
        count=n,
        limit=max_new_tokens or limit,
        temperature=temperature or usual,
        seed=seed,
        batch_size=batch_size,
        reward=found.reward_if_any(),
    )
    print(f"{out}: {artifacts.write_lines(out, written)} completions")


@app.command()
def score(
    run_dir: RunDir,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows {prompt, completion}, or {messages}.")],
    stage: RewardName = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Without it, to stdout.")] = None,
    batch_size: BatchSize = 32,
    base: MovedBase = None,
) -> None:
    """Score answers with a run's reward model, in the unit of its reports; JSON lines."""
    from rlhf_kit import artifacts, sampling
    from rlhf_kit.finished import FinishedRun

    if out is not None:
        artifacts.check_new_file(out)
    found = FinishedRun(run_dir, base)
    answers = sampling.read_answers(file)
    rows = sampling.scored(found, found.reward(stage), answers, batch_size=batch_size)
    if out is not None:
        print(f"{out}: {artifacts.write_lines(out, rows)} scores")
        return
    for row in rows:
        print(artifacts.json_line(row).decode(), end="")


@app.command("eval")
def evaluate(
    run_dir: RunDir,
    stages: Annotated[str | None, typer.Option(metavar="A,B,...", help="Or `base`; without it all policies.")] = None,
    against: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Another run, whose policy joins.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead of the recipe's held-out prompts.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=2, help="Prompts at most; without it as the recipe says.")] = None,
    best_of: Annotated[int, typer.Option(min=1, help="Samples a prompt for best-of-n; 1 leaves it out.")] = 64,
    best_of_prompts: Annotated[int, typer.Option(min=2, help="Prompts for best-of-n.")] = 64,
    text: Annotated[Path | None, typer.Option(metavar="CARD", help="Texts to measure the perplexity on.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Of lm-evaluation-harness: names, or YAML files.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question of a task.")] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Questions of a task at most.")] = None,
    preferences: Annotated[
        list[Path] | None,
        typer.Option(metavar="CARD", help="Comparisons to measure the reward model on. Repeatable."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="FOLDER_OR_ID", help="A language model that says which answer is better.")
    ] = None,
    pairs_out: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="Write answers in blind pairs for people to judge.")
    ] = None,
    human: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What they said: rows {id, preferred: a, b or tie}.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Prompts at a time.")] = None,
    base: MovedBase = None,
) -> None:
    """Compare the policies of a finished run on held-out prompts; figures go to eval.json and into report.html."""
    from rich.console import Console

    from rlhf_kit import artifacts, benchmark_tasks, judges, report
    from rlhf_kit.closing import print_comparison
    from rlhf_kit.comparison import Asked, Comparison
    from rlhf_kit.finished import FinishedRun
    from rlhf_kit.sampling import read_prompts

    if judge is not None and human is not None:
        raise InputError("--judge and --human: one of them says who wins; give one.")
    if pairs_out is not None:
        artifacts.check_new_file(pairs_out, "--pairs")
    if tasks is not None:
        benchmark_tasks.check_installed()
    found = FinishedRun(run_dir, base)
    asked = Asked(
        systems=None if stages is None else tuple(stages.split(",")),
        against=against,
        prompts=None if prompts is None else tuple(read_prompts(prompts)),
        count=count,
        best_of=best_of,
        best_of_prompts=best_of_prompts,
        text=text,
        preferences=tuple(preferences or ()),
        tasks=() if tasks is None else tuple(tasks.split(",")),
        fewshot=fewshot,
        task_limit=task_limit,
        batch_size=batch_size,
        judge=judges.HumanJudge(human) if human else judges.LocalJudge(judge, found.shared.device) if judge else None,
        pairs_out=pairs_out,
    )
    measured = Comparison(found, asked).measure()
    artifacts.write_json(run_dir / artifacts.EVAL, measured)
    report.write_report(run_dir)
    print_comparison(measured, run_dir, Console())


@app.command()
def serve_reward(
    run_dir: RunDir,
    stage: RewardName = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Whoever reaches it may ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 8000,
    batch_size: BatchSize = 64,
    base: MovedBase = None,
) -> None:
    """Serve a run's reward model over HTTP, for PPO elsewhere (`reward: http://...`), until Ctrl-C."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise InputError(f"serve-reward: not installed: {' '.join(missing)}; `pip install 'rlhf-kit[serve]'`.")
    from rlhf_kit import serving
    from rlhf_kit.finished import FinishedRun

    listening = serving.bound(host, port)
    served = serving.ServedReward(FinishedRun(run_dir, base), stage, batch_size)
    app = serving.application(served)
    listening.listen()  # who asks from here on is answered
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    print(f"{address} serves {served.stage} of {run_dir}; Ctrl-C ends it", flush=True)
    serving.serve(app, listening)


@app.command()
def merge(
    run_dir: RunDir,
    stage: Annotated[str, typer.Option(metavar="STAGE", help="A policy, or a reward model.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    base: MovedBase = None,
) -> None:
    """Write a stage as a plain checkpoint: its adapter folded into the base's full-precision weights."""
    from rlhf_kit.finished import FinishedRun
    from rlhf_kit.merge import merge as merged

    found = FinishedRun(run_dir, base)
    difference = merged(found, stage, out)
    print(f"{out}: {stage} folded into {found.recipe.base.model}, {found.recipe.base.dtype}")
    print(
        f"{difference.what} against base and adapter as trained ({found.recipe.base.quantization} quantisation): "
        f"differ by {difference.largest:.2g} at most, {difference.mean:.2g} on average; their own spread is "
        f"{difference.spread:.2g}"
    )


@app.command()
def push(
    run_dir: RunDir,
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="The repository; it is made if there is none.")],
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="Whose policy; without it the last one.")] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Of a repository that is made now.")] = True,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Another branch than main.")] = None,
    base: MovedBase = None,
) -> None:
    """Push a run to the Hub: adapters, manifests, recipe, data cards and a model card. The token is your login's."""
    from rlhf_kit.finished import FinishedRun
    from rlhf_kit.publish import push as pushed

    found = pushed(
        FinishedRun(run_dir, base), repo, stage=stage, private=private, create_pr=create_pr, revision=revision
    )
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{found.url} {'at' if found.new else 'has it already, at'} commit {found.commit}")


def main() -> None:
    """Run the command line and leave with its exit code."""
    quiet_libraries()
    try:
        app(prog_name="rlhf-kit")
    except ENDS as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, not once for each process
            print(error, file=sys.stderr)
        sys.exit({InputError: INPUT_IS_WRONG, Interrupted: STOPPED}.get(type(error), FAILED))


def quiet_libraries() -> None:
    """Leave of the libraries' talk what a user needs: errors. What the user has set stays."""
    defaults = {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # it warns when a process forks
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not sys.stderr.isatty():
        defaults |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in LIBRARIES.split("|"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=rf"({LIBRARIES})(\..*)?$")


if __name__ == "__main__":
    main()
