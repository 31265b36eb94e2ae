"""The files of a run: written whole, known by hash, held by one process."""

import json
import multiprocessing
from pathlib import Path

import pytest

from rlhf_kit import artifacts
from rlhf_kit.errors import InputError


def finished_stage(folder: Path) -> Path:
    """A stage's folder with an adapter, a checkpoint, a started.json and a manifest."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(b"abc")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / "checkpoints" / "step-000001" / "state.json").write_text("{}")
    (folder / artifacts.STARTED).write_text("{}")
    artifacts.write_manifest(folder, {"schema": artifacts.SCHEMA, "stage": folder.name})
    return folder


class TestHashes:
    def test_sha256_is_the_published_one(self, tmp_path):
        """The hash of "abc" is the example of FIPS 180-4."""
        (tmp_path / "x").write_bytes(b"abc")
        expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        assert artifacts.sha256_of_file(tmp_path / "x") == expected

    def test_order_of_keys_does_not_matter(self):
        """Two mappings with the same items have one hash; another value has another."""
        assert artifacts.hash_of({"a": 1, "b": 2}) == artifacts.hash_of({"b": 2, "a": 1})
        assert artifacts.hash_of({"a": 1}) != artifacts.hash_of({"a": 1.5})


class TestWriting:
    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        """When the disk gives up in the middle, what was there before is still whole."""
        path = tmp_path / "x.json"
        artifacts.write_json(path, {"old": True})

        def full(descriptor):
            raise OSError("no space left on device")

        monkeypatch.setattr(artifacts.os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            artifacts.write_json(path, {"new": True})
        assert artifacts.read_json(path) == {"old": True}

    def test_a_file_is_replaced_and_not_written_over(self, tmp_path):
        """Who has the old file open goes on reading the old content, and nothing temporary stays."""
        path = tmp_path / "x.json"
        artifacts.write_json(path, {"old": True})
        with path.open() as reader:
            artifacts.write_json(path, {"new": True})
            assert json.load(reader) == {"old": True}
        assert artifacts.read_json(path) == {"new": True} and list(tmp_path.iterdir()) == [path]

    def test_nan_is_refused(self, tmp_path):
        """A number that JSON has no word for does not reach a file."""
        with pytest.raises(ValueError, match="not JSON compliant"):
            artifacts.write_json(tmp_path / "x.json", {"loss": float("nan")})
        assert list(tmp_path.iterdir()) == []


class TestManifest:
    def test_it_lists_what_the_stage_leaves(self, tmp_path):
        """Every file of the folder with size and hash, but neither checkpoints nor the files about progress."""
        manifest = artifacts.read_manifest(finished_stage(tmp_path / "sft"))
        assert manifest is not None
        assert set(manifest["files"]) == {"adapter/weights", "metrics.jsonl"}
        assert manifest["files"]["adapter/weights"]["bytes"] == 3

    def test_an_unfinished_stage_has_none(self, tmp_path):
        """A folder without manifest.json is no finished stage, whatever else is in it."""
        (tmp_path / "sft").mkdir()
        assert artifacts.read_manifest(tmp_path / "sft") is None

    def test_one_of_another_schema_is_refused(self, tmp_path):
        """A manifest written by another version gets a message with both numbers and the way out."""
        (tmp_path / artifacts.MANIFEST).write_text('{"schema": 99}')
        with pytest.raises(InputError, match="schema 99, this version reads 1; run with --fresh"):
            artifacts.read_manifest(tmp_path)

    def test_every_changed_file_is_named(self, tmp_path):
        """Missing, of another size, of the same size but changed: each file is named with what is wrong."""
        folder = finished_stage(tmp_path / "sft")
        manifest = artifacts.read_manifest(folder)
        assert manifest is not None and artifacts.changed_files(folder, manifest) == []
        (folder / "adapter" / "weights").write_bytes(b"abd")
        (folder / "metrics.jsonl").write_text("")
        assert artifacts.changed_files(folder, manifest) == [
            "adapter/weights: changed",
            "metrics.jsonl: 0 bytes, was 12",
        ]
        (folder / "adapter" / "weights").unlink()
        assert artifacts.changed_files(folder, manifest)[0] == "adapter/weights: missing"


class TestDifferences:
    def test_keys_are_named_old_and_new(self):
        """A changed, an added and a removed key are each told as old -> new, hashes by their first digits."""
        old = {"a": 1, "same": "x", "gone": True, "data": "0" * 64}
        new = {"a": 2, "same": "x", "came": 0.5, "data": "1" * 64}
        assert artifacts.differences(old, new) == [
            "a: 1 -> 2",
            "gone: true -> none",
            "data: 000000000000 -> 111111111111",
            "came: none -> 0.5",
        ]

    def test_nested_settings_get_dotted_keys(self):
        """{"a": {"b": 1}} is {"a.b": 1}; lists stay whole."""
        assert artifacts.flat({"a": {"b": 1, "c": [2, 3]}, "d": None}) == {"a.b": 1, "a.c": [2, 3], "d": None}


def hold(folder: Path, holding, leave) -> None:
    with artifacts.locked(folder):
        holding.set()
        leave.wait(30)


class TestRunDirectory:
    def test_two_runs_in_one_directory_are_refused(self, tmp_path):
        """While another process holds the directory the message says which; when it is killed, nobody holds it."""
        context = multiprocessing.get_context("spawn")
        holding, leave = context.Event(), context.Event()
        other = context.Process(target=hold, args=(tmp_path / "run", holding, leave))
        other.start()
        try:
            assert holding.wait(30)
            with pytest.raises(InputError, match=f"another run is at work here \\(process {other.pid} on "):
                artifacts.locked(tmp_path / "run").__enter__()
        finally:
            other.kill()
            other.join()
        with artifacts.locked(tmp_path / "run"):
            pass

    def test_a_folder_with_other_things_is_refused(self, tmp_path):
        """Nothing is written beside what is not ours; an empty folder and an earlier run are fine."""
        artifacts.check_run_directory(tmp_path / "new")
        artifacts.check_run_directory(tmp_path)
        (tmp_path / "thesis.tex").write_text("...")
        with pytest.raises(InputError, match=r"is not empty and holds no recipe\.resolved\.yaml"):
            artifacts.check_run_directory(tmp_path)
        (tmp_path / artifacts.RECIPE).write_text("name: x\n")
        artifacts.check_run_directory(tmp_path)
        with pytest.raises(InputError, match="is a file"):
            artifacts.check_run_directory(tmp_path / "thesis.tex")

    def test_clearing_removes_only_what_runs_leave(self, tmp_path):
        """Stages and the run's own files go; a note that someone put beside them stays."""
        finished_stage(tmp_path / "sft")
        (tmp_path / artifacts.SUMMARY).write_text("{}")
        (tmp_path / "notes.txt").write_text("keep me")
        artifacts.clear(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_finished_stage_is_kept_while_it_runs_again(self, tmp_path):
        """Setting aside renames a finished stage, replacing the one kept before, and removes an unfinished one."""
        folder = finished_stage(tmp_path / "sft")
        artifacts.set_aside(folder)
        assert (tmp_path / "sft.previous" / artifacts.MANIFEST).is_file() and not folder.exists()
        folder.mkdir()
        artifacts.set_aside(folder)
        assert (tmp_path / "sft.previous" / artifacts.MANIFEST).is_file() and not folder.exists()

    def test_the_environment_names_no_one(self, tmp_path, monkeypatch):
        """Versions and device are in it; user, host and paths are not."""
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        text = json.dumps(artifacts.environment("cpu", 1, 2))
        assert '"torch"' in text and '"device": "cpu"' in text
        for private in (str(Path.home()), str(Path.cwd()), artifacts.socket.gethostname(), "hf_secret"):
            assert private not in text
