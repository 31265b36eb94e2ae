"""The folder of a checkpoint or an adapter, looked at before anything in it is loaded; a Hub model is fetched into one.

The libraries that load models follow what a folder says: links and `../` out of it, paths in a tokenizer's
configuration, pickles where safetensors are missing, an adapter that names another model. So every load of this package
goes through `opened` or `check_adapter`, which refuse such a folder with the reason. Nothing here imports torch or
transformers, so that `check` is quick.
"""

from __future__ import annotations

import functools
import json
import math
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from rlhf_kit import artifacts
from rlhf_kit.errors import InputError, first_line, printable
from rlhf_kit.settings import HubReference

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "ModelFolder",
    "adapter_problems",
    "check_adapter",
    "from_hub",
    "names_on_hub",
    "opened",
    "read_object",
    "safetensors_header",
]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VALUE_HEAD = "value_head.safetensors"
"""What trl and LLaMA-Factory write beside a causal adapter that is a reward model."""
LORA_WEIGHT = re.compile(r"\.lora_([AB]\.weight|embedding_[AB])$")
SCORE_HEAD = re.compile(r"(^|\.)score\.weight$")
HEADS = {"score", "classifier"}
"""What PEFT saves beside the adapter of a sequence classifier, under the names that it may have."""
PLAIN_LORA = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("modules_to_save", "init_lora_weights", "auto_mapping"),  # judged by themselves
}
"""Keys of an adapter's configuration whose effect on what it computes is here what it is in PEFT."""
PLAIN = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}
"""Other keys that PEFT always writes, where they ask for nothing; the rest are empty then."""
CHAT_TEMPLATE = "chat_template.jinja"
"""What transformers writes beside a tokenizer that has one."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt", "sentencepiece.bpe.model"}
"""Files of which a folder with a tokenizer has at least one."""
NEVER_OPENED = ("special_tokens_map_file", "added_tokens_file")
"""Keys of tokenizer configurations that name files, which older versions wrote and nobody reads."""
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""What is fetched of a Hub model beside its weights; and *.py where its code is trusted."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

MAX_JSON = 64 * 2**20
"""Bytes of a configuration or an index; tokenizer.json may have `MAX_TOKENIZER`."""
MAX_TOKENIZER = 512 * 2**20
MAX_TEMPLATE = 2**20
MAX_HEADER = 100_000_000
"""Bytes of the header of a weights file, which safetensors itself allows."""


# ---------------------------------------------------------------- to be loaded from


def opened(
    model: str, revision: str | None = None, *, setting: str, trust_remote_code: bool = False, weights: bool = True
) -> Path:
    """Return the folder to load a model from: the local one, or the snapshot that was fetched from the Hub.

    setting: what named the model, for messages. weights: false fetches, and looks at, what is there of configuration
    and tokenizer only.

    Raises:
        InputError: it cannot be had, or is not safe and complete.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = _small_files(model, revision, trust_remote_code)
            if weights and not ModelFolder(folder, trust_remote_code).problems(weights=False):
                _fetch_weights(model, folder)
        except (OSError, ValueError) as error:
            raise InputError(f"{setting}: cannot get {model} from the Hub: {first_line(error)}") from error
    problems = ModelFolder(folder, trust_remote_code).problems(weights=weights)
    if problems:
        raise InputError([f"{setting}: {problem}" for problem in problems])
    return folder


@functools.cache  # one run sees one commit, also while a branch moves on
def _small_files(model: str, revision: str | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*SMALL_FILES, *(["*.py"] if trust_remote_code else [])]
    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))


def _fetch_weights(model: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    shards = _shards(folder / INDEX) if (folder / INDEX).exists() else [WEIGHTS]
    snapshot_download(model, revision=folder.name, allow_patterns=[str(name) for name in shards])


def from_hub(reference: HubReference) -> tuple[Path, str]:
    """Return the folder, in a snapshot of the Hub's cache, of an adapter, a stage of a run, or a model, and its commit.

    Fetched are its small files, the manifests of stages, and the weights that are loaded; nothing pickled.

    Raises:
        OSError, ValueError: it cannot be had, as huggingface_hub says.
    """
    from huggingface_hub import snapshot_download

    level = f"{reference.subfolder}/" if reference.subfolder else ""
    snapshot = _snapshot(reference)
    folder = snapshot / level

    def fetch(*names: str) -> None:
        snapshot_download(reference.repo, revision=snapshot.name, allow_patterns=[level + name for name in names])

    if (folder / ADAPTER_CONFIG).is_file():
        fetch(ADAPTER_WEIGHTS, VALUE_HEAD)
    elif (folder / "adapter" / ADAPTER_CONFIG).is_file():  # a stage of ours; of an ensemble with several
        fetch(*(f"{place}adapter/{name}" for place in ("", "members/*/") for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)))
    elif (folder / "config.json").is_file():
        fetch(*(_shards(folder / INDEX) if (folder / INDEX).exists() else [WEIGHTS]))
    return folder, snapshot.name


@functools.cache
def _snapshot(reference: HubReference) -> Path:
    """Return the snapshot of a repository that has the small files of a folder in it, and manifests of stages."""
    from huggingface_hub import snapshot_download

    level = f"{reference.subfolder}/" if reference.subfolder else ""
    small = Path(
        snapshot_download(
            reference.repo,
            revision=reference.revision,
            allow_patterns=[level + pattern for pattern in SMALL_FILES],
            ignore_patterns=[f"{level}*/*"],
        )
    )
    beside = str(PurePosixPath(reference.subfolder).parent / "manifest.json")  # of adapter/, in the stage's folder
    ours = [beside, f"{level}*/manifest.json", f"{level}adapter/{ADAPTER_CONFIG}"]
    snapshot_download(reference.repo, revision=small.name, allow_patterns=ours)
    return small


def names_on_hub(reference: HubReference) -> set[str]:
    """Return the names of the files in a folder of the Hub, whether they were fetched or not; none if it cannot say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    level = f"{reference.subfolder}/" if reference.subfolder else ""
    try:
        names = HfApi().list_repo_files(reference.repo, revision=reference.revision)
    except (HTTPError, OSError, ValueError):
        return set()
    return {name.removeprefix(level) for name in names if name.startswith(level)}


def check_adapter(folder: Path) -> None:
    """Refuse an adapter folder that is not plain LoRA as safetensors.

    Raises:
        InputError: a file is missing or no regular file of the folder, or the configuration asks for more than LoRA.
    """
    problems = adapter_problems(folder)
    if problems:
        raise InputError(problems)


def adapter_problems(folder: Path) -> list[str]:
    """Return what keeps a folder from being loaded as a plain LoRA adapter, each in one line."""
    found = list(_entry_problems(folder)) or list(_adapter_problems(folder))
    return [printable(problem) for problem in found]


def _adapter_problems(folder: Path) -> Iterator[str]:
    weights, config = folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        yield (
            f"{folder} has pickled weights only (adapter_model.bin), which can run any code when they are read; "
            "save the adapter again as safetensors"
            if pickled
            else f"{weights}: no such file; an adapter folder holds {config.name} and {weights.name}"
        )
    else:
        try:
            safetensors_header(weights)
        except InputError as error:
            yield from error.problems
    if not config.is_file():
        yield f"{config}: no such file; an adapter folder holds {config.name} and {weights.name}"
        return
    try:
        settings = read_object(config)
    except InputError as error:
        yield from error.problems
        return
    if settings.get("peft_type") != "LORA":
        yield f"{config}: is not of peft_type LORA, the only one that is used here; seen {_seen(settings, 'peft_type')}"
    # The other ways of starting an adapter read files that the configuration names, pickled, or change the base.
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        yield f"{config}: init_lora_weights must be true; seen {_seen(settings, 'init_lora_weights')}"
    if settings.get("auto_mapping") is not None:
        yield f"{config}: auto_mapping names Python code to import; take it out"
    if not set(settings.get("modules_to_save") or ()) <= HEADS:
        yield (
            f"{config}: modules_to_save {_seen(settings, 'modules_to_save')} trains whole layers of the base, which "
            "stays as it is for every role; merge the adapter into its base and name that as base.model"
        )
    more = [key for key, value in settings.items() if key not in PLAIN_LORA and value and PLAIN.get(key) != value]
    if more:
        yield (
            f"{config}: asks for more than LoRA: {', '.join(f'{key} {_seen(settings, key)}' for key in more)}; merge "
            "the adapter into its base and name that as base.model, or train a plain one"
        )


# ---------------------------------------------------------------- looking


@dataclass
class ModelFolder:
    """A checkpoint in a local folder, looked at without loading it."""

    folder: Path
    trust_remote_code: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def problems(self, *, weights: bool = True) -> list[str]:
        """Return what keeps the folder from being loaded, each in one line; nothing that is no plain file is opened."""
        found = list(_entry_problems(self.folder)) or list(self._content_problems(weights))
        return [printable(problem) for problem in found]

    def _content_problems(self, weights: bool) -> Iterator[str]:
        names = {entry.name for entry in self.folder.iterdir()}
        if "config.json" not in names and weights:
            yield (
                f"{self.folder} is an adapter and not a model; name the model that it belongs to"
                if "adapter_config.json" in names
                else f"{self.folder} has no config.json, so it is no checkpoint of transformers{_inside(names)}"
            )
            return
        if "adapter_config.json" in names:  # transformers would load the adapter, or the model that it names
            yield f"{self.folder} is a model with an adapter in it (adapter_config.json); take the adapter's files out"
        if "config.json" in names:
            try:
                self.config = read_object(self.folder / "config.json")
            except InputError as error:
                yield from error.problems
            yield from self._config_problems()
        if weights:
            yield from self._weight_problems(names)
        if self.config.get("is_encoder_decoder"):
            yield f"{self.folder}: {self.config.get('model_type')} is an encoder-decoder; use a decoder-only model"
        if weights and not names & TOKENIZERS:
            yield f"{self.folder} has no tokenizer ({', '.join(sorted(TOKENIZERS))}); copy it from the original"
        for name in sorted(names & {"tokenizer_config.json", "special_tokens_map.json"}):
            try:
                yield from self._tokenizer_problems(name, read_object(self.folder / name))
            except InputError as error:
                yield from error.problems

    def _config_problems(self) -> Iterator[str]:
        at = self.folder / "config.json"
        for section in (self.config, *(value for value in self.config.values() if isinstance(value, dict))):
            for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
                if "/" in str(section.get(key) or ""):
                    yield f"{at} names code on the Hub as its {key} ({_seen(section, key)}); take the key out"
        yield from self._code_problems(at, self.config, is_tokenizer=False)

    def _code_problems(self, at: Path, config: dict[str, Any], *, is_tokenizer: bool) -> Iterator[str]:
        named = config.get("auto_map")
        if named is None:
            return
        if not self.trust_remote_code:
            if is_tokenizer:  # of a model, transformers' own class is taken, or it is refused when it is loaded
                yield (
                    f"{at} names Python code of the checkpoint in auto_map, which runs only with base.trust_remote_code"
                )
        elif "--" in json.dumps(named):
            yield f"{at} names code of another repository in auto_map, which no revision pins; copy it into this one"

    def _tokenizer_problems(self, name: str, config: dict[str, Any]) -> Iterator[str]:
        at = self.folder / name
        for key, value in config.items():
            if not isinstance(value, str) or key in NEVER_OPENED:
                continue
            if key in ("vocab", "merges", "gguf_file") or (key.endswith("_file") and not _is_plain(value)):
                yield (
                    f"{at} sets {key} to a path ({_seen(config, key)}); a tokenizer is read from its own folder only, "
                    "so take the key out"
                )
        files = config.get("fast_tokenizer_files") or []
        if not isinstance(files, list) or not all(isinstance(file, str) and _is_plain(file) for file in files):
            yield f"{at}: fast_tokenizer_files must be names of files in the folder; take the key out"
        if config.get("init_inputs"):
            yield f"{at}: init_inputs hands the tokenizer values that may be paths; take the key out"
        yield from self._code_problems(at, config, is_tokenizer=True)

    def _weight_problems(self, names: set[str]) -> Iterator[str]:
        if WEIGHTS in names:
            shards: list[Any] = [WEIGHTS]
        elif INDEX in names:
            try:
                shards = _shards(self.folder / INDEX)
            except InputError as error:
                yield from error.problems
                return
        else:
            pickles = sorted(name for name in names if Path(name).suffix in PICKLES)
            yield (
                f"{self.folder} has pickled weights only ({', '.join(pickles)}), which can run any code when they are "
                "read; convert them to model.safetensors, or use a revision that has it"
                if pickles
                else f"{self.folder} has no model.safetensors{_inside(names)}"
            )
            return
        headers, complete = [], True
        for shard in shards:
            if shard not in names:
                complete = False
                yield f"{self.folder} has no {shard}, which {INDEX} names; get it again"
            else:
                try:
                    headers.append(safetensors_header(self.folder / shard))
                except InputError as error:
                    complete = False
                    yield from error.problems
        if complete:
            yield from self._size_problems([tensor["shape"] for header in headers for tensor in header.values()])

    def _size_problems(self, shapes: list[list[int]]) -> Iterator[str]:
        """Yield what the configuration claims beyond the weights: it would be built, of random numbers, before that
        is seen."""
        widest = max((length for shape in shapes for length in shape), default=0)
        sections = [self.config, self.config.get("text_config")]
        for section in sections:
            for key, most in (("num_hidden_layers", len(shapes)), ("hidden_size", widest), ("vocab_size", widest)):
                claimed = section.get(key) if isinstance(section, dict) else None
                if isinstance(claimed, int) and claimed > most:
                    yield (
                        f"{self.folder}: config.json says {key} {claimed:,}, which the weights do not have "
                        f"({len(shapes):,} tensors, none wider than {widest:,}); get it again"
                    )

    @property
    def shards(self) -> list[str]:
        """The names of the files that its weights are loaded from."""
        return [WEIGHTS] if (self.folder / WEIGHTS).exists() else [str(name) for name in _shards(self.folder / INDEX)]

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The headers of the weights: what each tensor's type and shape are, by its name."""
        headers = [safetensors_header(self.folder / name) for name in self.shards]
        return {name: tensor for header in headers for name, tensor in header.items()}

    @property
    def sha256(self) -> str:
        """One hash, in hex, over the files that make the model: configuration, tokenizer, templates and weights.

        Other files may change without making it another model: a README, other formats of the weights, code that is not
        trusted. Names count, times and places do not: a copy of the same files has the same hash.
        """
        small = ["*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
        patterns = [*small, *(["*.py"] if self.trust_remote_code else [])]
        files = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()}
        files |= {self.folder / name for name in self.shards}
        return artifacts.hash_of({path.name: artifacts.sha256_of_file(path) for path in files})

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""
        return sum(math.prod(tensor["shape"]) for tensor in self.tensors.values())

    @property
    def context(self) -> int | None:
        """Tokens that the model reads at most, where its configuration says so."""
        context = self.config.get("max_position_embeddings", self.config.get("n_positions"))
        return context if isinstance(context, int) else None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The fast tokenizer without its special tokens, or None if there is only a slow one."""
        path = self.folder / "tokenizer.json"
        if not path.exists():
            return None
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more precise
            raise InputError(printable(f"{path} is not a tokenizer: {error}; get it again")) from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def _entry_problems(folder: Path) -> Iterator[str]:
    """Yield what in a folder, and in its folder of chat templates, is no plain file or folder inside it, or too large.

    In a snapshot of the Hub's cache, files are links to the blobs of that cache.
    """
    try:
        home = folder.resolve(strict=True)
        inside = [home]
        for place in (home, *home.parents):
            if place.parent.name == "snapshots":
                inside += [around / "blobs" for around in place.parents[1:3]]  # its own, and the cache's shared ones
                break
        templates = folder / "additional_chat_templates"
        entries = [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]
    except OSError as error:
        yield f"{folder}: cannot be read: {error.strerror or error}"
        return
    for entry in sorted(entries):
        try:
            target = entry.resolve(strict=True)
            about = target.stat()
        except (OSError, RuntimeError):
            yield f"{entry} is a link to nothing; get it again"
            continue
        if not any(target.is_relative_to(place) for place in inside):
            yield f"{entry} is a link out of its folder; put the file itself there"
        elif not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
            yield f"{entry} is neither a file nor a folder; take it out"
        elif about.st_size > (most := _most_bytes(entry)):
            yield f"{entry} has {about.st_size:,} bytes, more than the {most:,} it may have; get it again"


def _most_bytes(path: Path) -> float:
    if path.name == "tokenizer.json":
        return MAX_TOKENIZER
    return {".json": MAX_JSON, ".jinja": MAX_TEMPLATE}.get(path.suffix, math.inf)


def _shards(index: Path) -> list[str]:
    """Return the names of the weights files that an index names, sorted.

    Raises:
        InputError: it is no index, or names something else than files beside it.
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} is not an index of weights; get it again")
    odd = [name for name in weight_map.values() if not isinstance(name, str) or not _is_plain(name)]
    if odd:
        raise InputError(printable(f"{index} names {odd[0]!r}, which is no file of the folder; get it again"))
    return sorted(set(weight_map.values()))


def _is_plain(name: str) -> bool:
    """Whether a name is one of a file in the folder itself, which cannot lead out of it."""
    return name not in ("", ".", "..") and "\\" not in name and "\0" not in name and PurePosixPath(name).name == name


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return the tensors of a weights file, by name: {"dtype", "shape", "data_offsets"}.

    Raises:
        InputError: the file is cut off, or something else.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise InputError(f"{path} is a git-lfs pointer and not the weights; get them with git lfs pull")
        try:
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            if not all(isinstance(n, int) and n >= 0 for tensor in header.values() for n in tensor["shape"]):
                raise ValueError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path} is not a safetensors file; get it again") from None
    if size != end:
        raise InputError(f"{path} has {size:,} bytes and should have {end:,}: it is cut off; get it again")
    return header


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file of a model holds.

    Raises:
        InputError: it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}; get it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold an object; get it again")
    return content


def _seen(settings: dict[str, Any], key: str) -> str:
    text = json.dumps(settings.get(key), ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _inside(names: Iterable[str]) -> str:
    return f" (in it: {', '.join(sorted(names)[:6])})" if names else " (it is empty)"
