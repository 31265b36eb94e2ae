"""What is run, what is skipped and what is refused. The stages are stand-ins that write one file; the rest is real."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_kit import artifacts, distributed, pipeline
from rlhf_kit.errors import InputError, Interrupted
from rlhf_kit.model_folders import ModelFolder
from rlhf_kit.stages import Job, Outcome
from tests import tiny
from tests.end_to_end import chain
from tests.unit.test_unpadded import PADDED_AS_BEFORE, model


@dataclass
class World:
    """A recipe of three stages and a count of how often its stand-ins were run."""

    recipe: Path
    out: Path
    calls: list[str] = field(default_factory=list)
    during: dict[str, Callable[[Job], None]] = field(default_factory=dict)
    """What a stage does, by name, before it writes its adapter."""

    def run(self, *overrides: str, **options) -> list[str]:
        """Run the recipe and return the stages that were really run, "summary" for the evaluation."""
        self.calls.clear()
        pipeline.run(self.recipe, overrides, self.out, **options)
        return list(self.calls)

    def stage(self, job: Job) -> Outcome:
        self.calls.append(job.name)
        self.during.get(job.name, lambda job: None)(job)
        (job.folder / "adapter").mkdir(exist_ok=True)
        (job.folder / "adapter" / "weights").write_text(f"{job.name} {len(self.calls)}")
        return Outcome(metrics={"x/loss": 0.5}, data={}, extra={"tokens": 3, "probe": [1]})

    def evaluate(self, *arguments) -> dict:
        self.calls.append("summary")
        return {"reward": {}, "systems": {}, "win_rate": {}, "examples": [], "cost": {}}


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    world = World(chain.write_chain(tmp_path), tmp_path / "out")
    monkeypatch.setattr(pipeline, "stage_function", lambda settings: world.stage)
    monkeypatch.setattr(pipeline.evaluation, "summarise", world.evaluate)
    return world


ALL = ["sft", "reward", "ppo", "summary"]


def test_attention_is_kept_off_cudnns_kernels():
    """Some of their gradients are NaN."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    distributed.join()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_layers_that_cannot_be_computed_again_are_refused(world, monkeypatch):
    """Before anything is written."""
    monkeypatch.setattr("rlhf_kit.layers.can_compute_again", lambda _: False)
    with pytest.raises(InputError, match=r"stages\.sft\.activation_checkpointing: true, but"):
        world.run("stages.sft.activation_checkpointing=true")
    assert not world.out.exists()


def test_a_reward_model_that_the_base_cannot_have_is_refused(world, monkeypatch):
    """Before anything is written, and not once SFT is done: transformers has no sequence classifier of some kinds."""
    lfm2 = model("lfm2", PADDED_AS_BEFORE["lfm2"]).to("meta")
    monkeypatch.setattr("rlhf_kit.models.without_weights", lambda _: lfm2)
    with pytest.raises(InputError, match=r"base\.model: Lfm2ForCausalLM has no sequence classifier.*name a Hub model"):
        world.run()
    assert not world.out.exists()


class TestSkipping:
    def test_a_finished_recipe_is_not_run_again(self, world, capsys):
        """The second run of an unchanged recipe runs nothing, changes nothing, says so, and has the same summary."""
        assert world.run() == ALL
        before = {path: path.stat().st_mtime_ns for path in world.out.rglob("*") if path.name != artifacts.LOCK}
        capsys.readouterr()
        assert world.run() == []
        said = capsys.readouterr().err
        assert said.count("finished already, nothing has changed; skipped") == 3
        assert "summary: measured already" in said
        assert before == {path: path.stat().st_mtime_ns for path in world.out.rglob("*") if path.name != artifacts.LOCK}

    def test_a_changed_setting_runs_its_stage_and_what_depends_on_it(self, world, capsys):
        """ppo alone for its own setting; for one of the reward model that stage too; sft stays. The key is named."""
        world.run()
        capsys.readouterr()
        assert world.run("stages.ppo.kl_coef=0.1") == ["ppo", "summary"]
        assert "ppo: runs again, because of stages.ppo.kl_coef: 0.05 -> 0.1" in capsys.readouterr().err
        assert world.run("stages.ppo.kl_coef=0.1", "stages.reward.epochs=1") == ["reward", "ppo", "summary"]
        said = capsys.readouterr().err
        assert "reward: runs again, because of stages.reward.epochs: 2.0 -> 1.0" in said
        assert "ppo: runs again, because of inputs.reward: " in said

    @pytest.mark.parametrize("override", ["seed=8", "adapter.r=2", "base.quantization=8bit"])
    def test_what_all_stages_share_runs_them_all(self, world, override):
        """Seed, adapter shape and base are part of every stage."""
        world.run()
        assert world.run(override) == ALL

    def test_changed_data_runs_the_stage_that_reads_it(self, world, capsys):
        """Rows count, not the time or name of their file: the same rows elsewhere change nothing."""
        world.run()
        rows = world.recipe.parent / "shown.jsonl"
        os.utime(rows, (0, 0))
        moved = world.recipe.with_name("moved.md")
        shutil.copy(world.recipe.with_name("shown.md"), moved)
        assert world.run(f"stages.sft.data={moved}") == []
        rows.write_text(rows.read_text() + json.dumps({"prompt": "New?", "completion": " Yes."}) + "\n")
        capsys.readouterr()
        assert world.run() == ALL
        assert "sft: runs again, because of stages.sft.data: " in capsys.readouterr().err

    def test_a_changed_base_runs_everything(self, world):
        """Other weights in the same folder are another base."""
        world.run()
        tiny.make_checkpoint(world.recipe.parent / "model", seed=1)
        pipeline.models._content.cache_clear()  # a process takes a base to stay as it is
        assert world.run() == ALL

    def test_a_setting_that_changes_no_result_runs_nothing(self, world):
        """How often a checkpoint is written is not part of what a stage was made from, nor what is computed twice."""
        world.run()
        assert world.run("stages.ppo.checkpoint_every.updates=1", "stages.ppo.kl_budget=3") == []
        assert world.run("stages.sft.activation_checkpointing=true") == []

    def test_another_evaluation_only_measures_again(self, world):
        """A changed evaluation leaves the stages alone."""
        world.run()
        assert world.run("evaluation.count=8") == ["summary"]


class TestManifest:
    def test_it_tells_where_the_stage_came_from(self, world):
        """Settings, seed, base, tokenizer, consumed manifests, cost and the stage's own fields are in it."""
        world.run()
        manifest = artifacts.read_json(world.out / "ppo" / artifacts.MANIFEST)
        assert manifest["stage"] == manifest["kind"] == "ppo"
        assert manifest["settings"]["kl_coef"] == 0.05
        assert manifest["settings_hash"] == artifacts.hash_of(manifest["settings"])
        assert manifest["seed"] == 7
        assert manifest["inputs"] == {name: artifacts.manifest_hash(world.out / name) for name in ("sft", "reward")}
        assert manifest["base"]["sha256"] == ModelFolder(world.recipe.parent / "model").sha256
        assert manifest["tokenizer"]["end_token"] == "</s>"
        assert manifest["metrics"] == {"x/loss": 0.5} and manifest["probe"] == [1]
        assert manifest["cost"]["tokens"] == 3 and manifest["cost"]["seconds"] > 0
        assert set(manifest["files"]) == {"adapter/weights"}

    def test_the_run_directory_tells_what_ran(self, world):
        """The resolved recipe has every default, the environment the versions, and nothing temporary is left."""
        world.run("stages.ppo.kl_coef=0.1")
        resolved = yaml.safe_load((world.out / artifacts.RECIPE).read_text())
        assert resolved["stages"]["ppo"]["kl_coef"] == 0.1 and resolved["stages"]["ppo"]["gamma"] == 1.0
        assert "torch" in artifacts.read_json(world.out / artifacts.ENVIRONMENT)["packages"]
        left = {path.name for path in world.out.rglob("*")}
        assert not left & {artifacts.STARTED, artifacts.CHECKPOINTS}
        assert not [name for name in left if "partial" in name or "previous" in name]

    @pytest.mark.parametrize("only", [None, "ppo"])
    def test_changed_files_are_named(self, world, only):
        """A finished stage whose files were touched is neither used nor quietly made again."""
        world.run()
        (world.out / "sft" / "adapter" / "weights").write_text("other")
        with pytest.raises(InputError, match=r"sft: not as it was .*adapter/weights: changed"):
            world.run("stages.ppo.kl_coef=0.1", only=only)
        assert world.calls == []
        assert world.run(only="sft", fresh=True)[0] == "sft"


def interrupt(job: Job) -> None:
    """Save a checkpoint and stop, as a stage does after a signal."""
    os.kill(os.getpid(), signal.SIGTERM)
    assert job.stop.requested
    (job.folder / artifacts.CHECKPOINTS / "step-000001").mkdir(parents=True)
    raise Interrupted(f"{job.name}: stopped after step 1")


class TestInterrupted:
    def test_it_goes_on_from_its_checkpoint(self, world, capsys):
        """The next run finds the stage's folder as it was left; the message had the command, without --fresh."""
        world.during["reward"] = interrupt
        with pytest.raises(Interrupted) as caught:
            world.run("stages.ppo.kl_coef=0.1", fresh=True)
        again = f"rlhf-kit run {world.recipe} --set stages.ppo.kl_coef=0.1 --out {world.out}"
        assert str(caught.value).splitlines()[-1].strip() == again
        assert not (world.out / "reward" / artifacts.MANIFEST).exists()

        found = []
        world.during["reward"] = lambda job: found.append((job.folder / artifacts.CHECKPOINTS / "step-000001").is_dir())
        assert world.run("stages.ppo.kl_coef=0.1") == ["reward", "ppo", "summary"]
        assert found == [True]
        assert "reward: was interrupted; going on from its checkpoint" in capsys.readouterr().err
        assert not (world.out / "reward" / artifacts.CHECKPOINTS).exists()

    def test_with_other_settings_it_starts_anew(self, world, capsys):
        """A checkpoint of other settings is not gone on from, and the log says which."""
        world.during["reward"] = interrupt
        with pytest.raises(Interrupted):
            world.run()
        found = []
        world.during["reward"] = lambda job: found.append((job.folder / artifacts.CHECKPOINTS).exists())
        world.run("stages.reward.epochs=1")
        assert found == [False]
        said = capsys.readouterr().err
        assert "reward: was interrupted and starts anew, because of stages.reward.epochs: 2.0 -> 1.0" in said

    def test_its_cost_is_counted_over_all_attempts(self, world):
        """Seconds before an interruption are part of the stage's cost."""

        def slowly(job: Job) -> None:
            begun = artifacts.read_json(job.folder / artifacts.STARTED)
            artifacts.write_json(job.folder / artifacts.STARTED, {**begun, "seconds": 1000.0})
            interrupt(job)

        world.during["sft"] = slowly
        with pytest.raises(Interrupted):
            world.run()
        world.during.clear()
        world.run()
        assert artifacts.read_json(world.out / "sft" / artifacts.MANIFEST)["cost"]["seconds"] > 1000

    def test_a_signal_between_stages_stops_before_the_next(self, world):
        """A stage that finished in spite of the signal stays finished; the next one is not begun."""
        world.during["sft"] = lambda job: os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="stopped before reward"):
            world.run()
        world.during.clear()
        assert world.run() == ["reward", "ppo", "summary"]

    def test_a_second_interrupt_leaves_at_once(self, world):
        """Pressing Ctrl-C twice does not wait for a checkpoint."""

        def twice(job: Job) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        world.during["sft"] = twice
        with pytest.raises(KeyboardInterrupt):
            world.run()

    def test_during_the_evaluation_a_signal_stops_at_once(self, world, monkeypatch):
        """There is nothing to save there; the stages are finished and the next run only measures."""
        monkeypatch.setattr(pipeline.evaluation, "summarise", lambda *rest: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="SIGTERM"):
            world.run()
        monkeypatch.setattr(pipeline.evaluation, "summarise", world.evaluate)
        assert world.run() == ["summary"]

    def test_handlers_are_put_back(self, world):
        """After a run, signals do again what they did before."""
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        world.run()
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


class TestFailure:
    def test_the_old_result_is_kept_until_the_new_one_is_there(self, world):
        """A stage that runs again and breaks leaves its finished predecessor beside it."""
        world.run()

        def broken(job: Job) -> None:
            raise ZeroDivisionError

        world.during["ppo"] = broken
        with pytest.raises(ZeroDivisionError):
            world.run("stages.ppo.kl_coef=0.1")
        kept = world.out / "ppo.previous"
        assert artifacts.read_json(kept / artifacts.MANIFEST)["settings"]["kl_coef"] == 0.05
        assert (kept / "adapter" / "weights").is_file()
        world.during.clear()
        assert world.run("stages.ppo.kl_coef=0.1") == ["ppo", "summary"]
        assert not kept.exists()

    def test_a_stage_that_broke_without_a_checkpoint_starts_in_an_empty_folder(self, world):
        """What a broken attempt left does not get into the next one's manifest."""

        def broken(job: Job) -> None:
            (job.folder / "samples.jsonl").write_text("half a line")
            raise ZeroDivisionError

        world.during["sft"] = broken
        with pytest.raises(ZeroDivisionError):
            world.run()
        world.during.clear()
        world.run()
        assert set(artifacts.read_json(world.out / "sft" / artifacts.MANIFEST)["files"]) == {"adapter/weights"}


class TestOnlyAndFresh:
    def test_only_runs_one_stage(self, world, capsys):
        """`only` needs what it builds on; the summary waits until every stage is there."""
        with pytest.raises(InputError, match="--only reward: it builds on sft, which is not finished"):
            world.run(only="reward")
        assert world.run(only="sft") == ["sft"]
        assert "no summary yet: reward, ppo to be run" in capsys.readouterr().err
        assert world.run(only="reward") == ["reward"]
        assert world.run(only="ppo") == ["ppo", "summary"]

    def test_only_refuses_what_was_made_from_something_else(self, world):
        """A changed setting of an earlier stage is not passed over."""
        world.run()
        with pytest.raises(InputError, match=r"--only ppo: it builds on .*stages\.sft\.epochs: 3\.0 -> 1\.0"):
            world.run("stages.sft.epochs=1", only="ppo")

    def test_only_of_an_unknown_stage(self, world):
        """A stage that is not in the recipe gets a suggestion."""
        with pytest.raises(InputError, match=r"--only rewards: .* has no such stage; did you mean reward"):
            world.run(only="rewards")

    def test_fresh_runs_everything_again(self, world):
        """With --fresh nothing is skipped; with --only too, that stage alone is made anew."""
        world.run()
        assert world.run(fresh=True) == ALL
        assert world.run(only="sft", fresh=True) == ["sft"]


class TestRefused:
    def test_nothing_is_written_for_a_wrong_recipe(self, world):
        """When something is wrong, the run directory is not even made."""
        with pytest.raises(InputError, match="kl_coeff"):
            world.run("stages.ppo.kl_coeff=0.1")
        assert not world.out.exists()

    def test_prompts_that_do_not_fit_are_refused_before_the_first_stage(self, world):
        """With the real tokenizer: one token too many, its BOS, is found in the rows of PPO and of the evaluation."""
        rows = [{"prompt": f"{number:030}"} for number in range(20)]
        world.recipe.with_name("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(InputError, match=r"asked\.jsonl:\d+ \(31 tokens\)") as caught:
            world.run("stages.ppo.max_new_tokens=98")
        assert [problem.split(": ")[1] for problem in caught.value.problems] == ["stages.ppo", "evaluation"]
        assert world.calls == [] and not world.out.exists()

    def test_rows_of_later_stages_are_checked_before_the_first(self, world):
        """A reward pair that is too long is found before SFT has begun."""
        with pytest.raises(
            InputError, match=r"stages\.reward: 1 of .*longer than 36 tokens: .*pairs\.jsonl:10 \(37 tokens"
        ):
            world.run("stages.reward.max_length=36")
        assert world.calls == [] and not world.out.exists()

    def test_a_scoring_function_is_imported_before_the_first_stage(self, world):
        """A reward function that is not there is found before SFT has begun."""
        with pytest.raises(InputError, match=r"rlhf_kit\.errors has no 'score'"):
            world.run("stages.ppo.reward=rlhf_kit.errors:score")
        assert world.calls == [] and not world.out.exists()

    def test_a_tracker_that_is_not_installed_is_refused_before_the_first_stage(self, world, monkeypatch):
        """accelerate would leave it out without a word."""
        monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
        with pytest.raises(InputError, match="trackers: not installed: mlflow; `pip install mlflow`"):
            world.run("trackers=[mlflow]")
        assert world.calls == [] and not world.out.exists()

    @pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
    def test_splitting_the_base_over_processes_is_refused(self, world, monkeypatch, kind):
        """int8 with FSDP or DeepSpeed is refused with what to use instead."""
        monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
        with pytest.raises(InputError, match=rf"{kind} splits .*int8 .*multi_gpu\.yaml, and base\.quantization: 4bit"):
            world.run("base.quantization=8bit")
        assert not world.out.exists()

    def test_a_run_directory_held_by_another_run_is_refused(self, world):
        """Two runs in one directory would write over each other."""
        with artifacts.locked(world.out), pytest.raises(InputError, match="another run is at work here"):
            world.run()


def test_overrides_may_be_a_mapping(world):
    """From Python, overrides are a mapping of dotted keys, nested as one likes."""
    pipeline.run(world.recipe, {"stages.ppo": {"kl_coef": 0.2}, "seed": 3}, world.out)
    resolved = yaml.safe_load((world.out / artifacts.RECIPE).read_text())
    assert resolved["seed"] == 3 and resolved["stages"]["ppo"]["kl_coef"] == 0.2
