"""One frozen base, loaded once; every role on it is a LoRA adapter, and some roles carry a head.

Two ways of using the base stand here. A stage that trains one adapter with a stock trainer takes `load_base`, perhaps
`classifier`, and `add_adapter`. PPO takes a `SharedBase`, on which policy, reference policy, reward model and value
function live side by side; only `SharedBase.using` switches between them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

from rlhf_kit import artifacts, foreign, layers, recipe, unpadded
from rlhf_kit.collate import TextFormat
from rlhf_kit.errors import InputError, first_line
from rlhf_kit.foreign import Foreign
from rlhf_kit.maths.logprobs import OutputHead
from rlhf_kit.model_folders import ADAPTER_WEIGHTS, ModelFolder, check_adapter, opened, safetensors_header
from rlhf_kit.settings import without_local_paths

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns in every layer of every pass

SUMMATION_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}
"""How far two results near 1 may be apart where only the order of summation differs (padding, batch size)."""

TARGETS = "adapter.target_modules"

BASE = "base"
"""The role without an adapter: the pretrained checkpoint itself. It is not the KL reference."""


# ---------------------------------------------------------------- the base


def base_identity(base: recipe.Base) -> dict[str, Any]:
    """Return name, revision, precision and content of a base; two are the same by the last two.

    One from the Hub is fetched for it.

    Raises:
        InputError: it cannot be had.
    """
    return {
        "name": base.model,
        "revision": base.revision,
        "quantization": base.quantization,
        "dtype": base.dtype,
        "sha256": _content(base.model, base.revision, base.trust_remote_code),
    }


@functools.cache  # a base is gigabytes, and does not change while it is in use
def _content(model: str, revision: str | None, trust_remote_code: bool) -> str:
    folder = opened(model, revision, setting="base.model", trust_remote_code=trust_remote_code)
    return ModelFolder(folder, trust_remote_code).sha256


def context_length(base: recipe.Base) -> int | None:
    """Return how many tokens the base reads at most, or None where its configuration sets no limit.

    Raises:
        InputError: transformers does not know this kind of model.
    """
    return getattr(_config(base).get_text_config(), "max_position_embeddings", None)


def _config(base: recipe.Base) -> PretrainedConfig:
    folder = _opened(base, weights=False)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=base.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _cannot_load(base, error) from error


def _opened(base: recipe.Base, *, weights: bool = True) -> Path:
    return opened(
        base.model, base.revision, setting="base.model", trust_remote_code=base.trust_remote_code, weights=weights
    )


def without_weights(base: recipe.Base) -> PreTrainedModel:
    """Return the causal language model of the recipe on the meta device: frozen, unquantised, shapes without numbers.

    Raises:
        InputError: transformers does not know this kind of model.
    """
    config = _config(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, base.dtype), trust_remote_code=base.trust_remote_code
        )
    return model.requires_grad_(False).eval()


def _cannot_load(base: recipe.Base, error: Exception) -> InputError:
    code = "trust_remote_code" in str(error)  # transformers has no class of its own for this kind of model
    trust = "; read that code, and let it run with base.trust_remote_code: true, or use another model" if code else ""
    return InputError(f"base.model: cannot load {base.model}: {first_line(error)}{trust}")


def load_base(base: recipe.Base, text_format: TextFormat, accelerator: Accelerator) -> PreTrainedModel:
    """Return the causal language model of the recipe on this process's device: frozen and in eval mode.

    Raises:
        InputError: it cannot be loaded from safetensors, weights are missing, or the tokenizer has more entries than
            the embedding has rows.
    """
    dtype = getattr(torch, base.dtype)
    folder = _opened(base)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=_quantization(base.quantization, dtype),
            device_map={"": accelerator.device},
            trust_remote_code=base.trust_remote_code,  # None would ask on the terminal
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(base, error) from error
    unloaded = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unloaded:
        raise InputError(
            f"base.model: {base.model}: the checkpoint has no weights for {', '.join(unloaded[:5])}"
            f"{' …' if len(unloaded) > 5 else ''}; they would be random. Use a complete checkpoint."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(text_format.tokenizer) > rows:
        raise InputError(
            f"base.model: {base.model}: the tokenizer has {len(text_format.tokenizer)} entries but the embedding "
            f"only {rows} rows; use the tokenizer that belongs to the checkpoint."
        )
    _as_frozen(model, base)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def _quantization(name: Literal["none", "8bit", "4bit"], dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if name == "8bit":
        # Threshold 0 turns the outlier decomposition off. With it a row's logits depend on the other rows of its batch
        # (by up to 0.5 nats on a small Llama), so log-probabilities of one completion would differ between passes.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if name == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def one_layer(base: recipe.Base, inputs: int, outputs: int, device: torch.device) -> nn.Module:
    """Return a frozen linear layer without a bias, of random weights, held as the base holds its own."""
    dtype = getattr(torch, base.dtype)
    config = _quantization(base.quantization, dtype)
    if config is None:
        layer: nn.Module = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    else:
        import bitsandbytes as bnb

        if config.load_in_8bit:
            how = {"has_fp16_weights": False, "threshold": config.llm_int8_threshold}
            layer = bnb.nn.Linear8bitLt(inputs, outputs, bias=False, **how)
        else:
            how = {"compute_dtype": dtype, "quant_type": config.bnb_4bit_quant_type}
            layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, **how)
        _as_frozen(layer, base)
    return layer.to(device).eval().requires_grad_(False)


def _as_frozen(model: nn.Module, base: recipe.Base) -> None:
    _steady_4bit_on_cpu(model)
    if base.quantization == "8bit":
        layers.keep_no_inputs_of_8bit(model)


def _steady_4bit_on_cpu(model: nn.Module) -> None:
    """Keep 4-bit layers off the AVX512-BF16 path, which repacks their weights in the first no-grad forward pass.

    After that, gradients are silently wrong (relative error 0.955), and widths that 64 does not divide crash.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (nn.Module declares no such name)


def checkpointed(wanted: bool | None, model: nn.Module, device: torch.device) -> bool:
    """Return whether a model's layers are to keep their inputs alone for the backward pass.

    wanted: a stage's `activation_checkpointing`.
    """
    return layers.can_compute_again(model) and (device.type == "cuda" if wanted is None else wanted)


# ---------------------------------------------------------------- the reward model's shape


def classifier(causal: PreTrainedModel) -> PreTrainedModel:
    """Return a one-label sequence classifier around the trunk of `causal`, with a new head.

    It is the architecture's own `…ForSequenceClassification`, so adapters trained on it are standard `SEQ_CLS` ones.
    The trunk is shared, not loaded again: loading a checkpoint with tied embeddings as a classifier may leave its
    embeddings random. The score is read at the last real token by the attention mask, not by comparing with a pad id.

    Raises:
        InputError: transformers has no sequence classifier for this architecture.
    """
    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            shell = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise InputError(
            f"base.model: {type(causal).__name__} has no sequence classifier in transformers, so no reward model can "
            "be built on it; use another base, or name a Hub model or a function as the reward."
        ) from error
    if shell.base_model_prefix != causal.base_model_prefix or not isinstance(getattr(shell, "score", None), nn.Linear):
        raise InputError(
            f"base.model: the sequence classifier of {type(causal).__name__} does not share its trunk; use another "
            "base, or name a Hub model or a function as the reward."
        )
    trunk = getattr(causal, causal.base_model_prefix)
    setattr(shell, shell.base_model_prefix, trunk)
    width = shell.score.in_features
    shell.score = new_head(width, causal.device)
    for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "quantization_method", "hf_quantizer", "hf_device_map"):
        if hasattr(causal, name):
            setattr(shell, name, getattr(causal, name))
    shell.forward = types.MethodType(_classify, shell)
    return shell.eval()


def new_head(width: int, device: torch.device, *, bias: bool = False) -> nn.Linear:
    """Return a float32 head from `width` to one number, with weights of variance 1 / (width + 1).

    Source: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix B.1.
    """
    head = nn.Linear(width, 1, bias=bias, device=device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=1 / math.sqrt(width + 1))
    if bias:
        nn.init.zeros_(head.bias)
    return head


def _classify(
    self: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **_: Any,
) -> SequenceClassifierOutput:
    """The forward pass of `classifier`: logits [B, 1], the head at the last position that the mask marks as real, and
    the last hidden states [B, T, H].
    """
    trunk = getattr(self, self.base_model_prefix)
    hidden = trunk(
        input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, use_cache=False
    ).last_hidden_state
    if attention_mask is None:
        last = torch.full(hidden.shape[:1], hidden.shape[1] - 1, device=hidden.device)
    else:
        last = (torch.arange(hidden.shape[1], device=hidden.device) * attention_mask).argmax(-1)
    logits = self.score(hidden[torch.arange(len(hidden)), last].float())
    return SequenceClassifierOutput(logits=logits, hidden_states=(hidden,))


def sequence_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the raw scores [B] that a reward model (with or without PEFT or DDP around it) gives whole sequences."""
    return scores_and_states(model, input_ids, attention_mask)[0]


def scores_and_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores [B] of `sequence_scores` and the trunk's last hidden states [B, T, H]."""
    output = model(input_ids=input_ids, attention_mask=attention_mask)
    return output.logits.squeeze(-1).float(), output.hidden_states[0]


# ---------------------------------------------------------------- adapters


def add_adapter(
    model: PreTrainedModel,
    adapter: recipe.Adapter,
    task: Literal["CAUSAL_LM", "SEQ_CLS"],
    *,
    init: Path | None,
    seed: int,
    base: recipe.Base,
) -> PeftModel:
    """Return `model` with a new trainable float32 LoRA adapter named "default".

    init: an adapter folder whose shape it has and whose LoRA weights it starts from (its heads are not taken over);
    None has the shape of `adapter` and starts at zero.
    seed: of the adapter's random half and, for `SEQ_CLS`, of the head.

    Raises:
        InputError: `init` was made for another base.
    """
    if init is not None:
        config = _shaped_as(init, model, task)
        config.lora_dropout = adapter.dropout
    else:
        config = lora_config(adapter, task)
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
        torch.manual_seed(seed)
        if task == "SEQ_CLS":
            nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
        peft_model = adapted(model, config)
    if init is not None:
        _copy_lora(peft_model, "default", init, base)
    return peft_model


def adapted(model: PreTrainedModel, config: LoraConfig, where: str = TARGETS) -> PeftModel:
    """Return `model` with a new adapter of a shape.

    where: the setting that names its modules, for messages.

    Raises:
        InputError: there is nothing to adapt by one of these names, or something that is not adapted here.
    """
    head = model.get_output_embeddings()
    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, layer in model.base_model.named_modules()
            if isinstance(layer, nn.Linear | Conv1D) and layer is not head
        }
    )

    def refused(why: str) -> InputError:
        return InputError(f"{where}: {why}; name some of {', '.join(linear)}.")

    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise refused(f"PEFT says: {first_line(error).removesuffix('.')}") from error
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise refused("names the base's output head, which stays as it is for every role")
    if experts := peft_model.base_model.targeted_parameter_names:
        raise refused(f"names {experts[0]}, which is no layer; no role can have an adapter on it")
    return peft_model


def tried(model: PreTrainedModel, adapter: recipe.Adapter, where: str) -> PeftModel:
    """Return `model`, one without weights, with the recipe's adapter. where: as `adapted` takes it.

    Raises:
        InputError: as `adapted`; or one name of several is of nothing in the base.
    """
    with torch.device("meta"):
        peft_model = adapted(model, lora_config(adapter, "CAUSAL_LM"), where)
    found = peft_model.base_model.targeted_module_names
    named = [] if isinstance(adapter.target_modules, str) else adapter.target_modules
    for name in named:
        if not any(f".{module}".endswith(f".{name}") for module in found):
            raise InputError(f"{where}: adapts nothing by the name {name}; take it out.")
    return peft_model


def check_stages(whole: recipe.Recipe, model: PreTrainedModel) -> None:
    """Refuse stages of a recipe that its base cannot have. model: the base, without weights.

    Raises:
        InputError: a reward model, where there is no sequence classifier of the kind; or activation checkpointing, of
            layers that cannot be computed again.
    """
    for name, stage in whole.stages.items():
        if isinstance(stage, recipe.RewardStage):
            classifier(model)
        if stage.activation_checkpointing and not layers.can_compute_again(model):
            raise InputError(
                f"{whole.where(f'stages.{name}.activation_checkpointing')}: true, but transformers cannot compute the "
                f"layers of {type(model).__name__} again; leave it out, and take a smaller microbatch where memory is "
                "short."
            )


def lora_config(adapter: recipe.Adapter, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> LoraConfig:
    """Return the recipe's shape of an adapter as PEFT has it."""
    targets = adapter.target_modules
    return LoraConfig(
        task_type=TaskType(task),
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def save_adapter(model: PeftModel, folder: Path, base: recipe.Base, role: str = "default") -> None:
    """Write one adapter as standard PEFT files, with its head where it has one.

    It names the base as the recipe does: a Hub id, a folder's path below the working directory, or the folder's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=role, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = to_bytes(weights, metadata={"format": "pt"})  # one key: several come in random order
    artifacts.write_atomically(folder / ADAPTER_WEIGHTS, content)
    config = copy.deepcopy(model.peft_config[role])
    config.inference_mode = True
    for name in ("target_modules", "exclude_modules"):
        modules = getattr(config, name)
        if modules is not None and not isinstance(modules, str):
            setattr(config, name, sorted(modules))  # a set, whose order is another in every process
    config.base_model_name_or_path = without_local_paths(base.model)
    config.revision = None if Path(base.model).is_dir() else base.revision
    config.save_pretrained(str(folder))


def _copy_lora(model: PeftModel, role: str, folder: Path, base: recipe.Base) -> dict[str, Tensor]:
    """Copy an adapter folder's LoRA weights into `role` and return the other tensors of the folder (heads)."""
    stored = read_adapter(folder)
    manifest = artifacts.manifest_at(folder.parent / artifacts.MANIFEST)
    theirs, ours = manifest and manifest["base"]["sha256"], base_identity(base)["sha256"]
    if theirs and theirs != ours:
        raise InputError(
            f"{folder}: this adapter was made for another base (content {theirs[:12]}) than {base.model} "
            f"(content {ours[:12]}); name the base it was trained on, or train it again on this one."
        )
    wanted = _lora_weights(model, role)
    lora = {name: tensor for name, tensor in stored.items() if ".lora_" in name}
    if wrong := _unlike(wanted, {name: tensor.shape for name, tensor in lora.items()}):
        raise InputError(f"{folder}: {_does_not_fit(base, wrong)}")
    with torch.no_grad():
        for name, tensor in lora.items():
            wanted[name].copy_(tensor)
    return {name: tensor for name, tensor in stored.items() if name not in lora}


def _lora_weights(model: PeftModel, role: str) -> dict[str, nn.Parameter]:
    """Return the weights of a role's adapter by the names that they have in a file."""
    lora_name = re.compile(rf"\.(lora_\w+)\.{re.escape(role)}(\.weight)?$")
    return {
        lora_name.sub(r".\1\2", name): parameter
        for name, parameter in model.named_parameters()
        if lora_name.search(name)
    }


def _unlike(wanted: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the weights that are in one of the two only, or else those of another shape."""
    return sorted(wanted.keys() ^ shapes.keys()) or [
        name for name, shape in shapes.items() if list(shape) != list(wanted[name].shape)
    ]


def _does_not_fit(base: recipe.Base, wrong: Sequence[str]) -> str:
    return (
        f"this adapter does not fit {base.model}: {wrong[0]} and {len(wrong) - 1} more weights differ in name or "
        "shape; it was made for another base, rank or target."
    )


def _shaped_as(folder: Path, model: PreTrainedModel, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> LoraConfig:
    """Return the configuration of an adapter on `model` that has the shape of the one in a folder, without dropout."""
    check_adapter(folder)
    config = LoraConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save, config.inference_mode = TaskType(task), None, False
    config.lora_dropout, config.init_lora_weights = 0.0, True
    # PEFT warns of another name; `_copy_lora` looks closer.
    config.base_model_name_or_path = model.name_or_path
    return config


def misfits(base: recipe.Base, artefact: Foreign) -> tuple[list[str], list[str]]:
    """Return why an adapter that others made does not fit the base, and notes on how far that can be told.

    The base is built without weights for it, so this takes no memory and is done before anything is trained.
    """
    if artefact.kind == "model":
        return [], []
    problem, note = foreign.base_told_apart(artefact, base, lambda: base_identity(base)["sha256"])
    problems = [problem] if problem else [f"{artefact.written}: {found}" for found in _unfitting(base, artefact)]
    return problems, [note] if note else []


def _unfitting(base: recipe.Base, artefact: Foreign) -> Iterator[str]:
    model = without_weights(base)
    try:
        with torch.device("meta"):
            peft_model = get_peft_model(model, _shaped_as(artefact.folder, model, "CAUSAL_LM"))
    except ValueError as error:  # PEFT found none of the modules, or none that it can adapt
        yield f"this adapter does not fit {base.model}: {first_line(error)}"
        return
    header = safetensors_header(artefact.folder / ADAPTER_WEIGHTS)
    lora = {name: tensor["shape"] for name, tensor in header.items() if ".lora_" in name}
    if wrong := _unlike(_lora_weights(peft_model, "default"), lora):
        yield _does_not_fit(base, wrong)
    elif isinstance(model.get_output_embeddings(), BaseTunerLayer):
        yield "adapts the base's output head, which stays as it is for every role; merge it into its base"


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder: its LoRA weights and, of a reward adapter, its head.

    Raises:
        InputError: the folder is not plain LoRA as safetensors.
    """
    check_adapter(folder)
    return load_file(folder / ADAPTER_WEIGHTS)


def open_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return `model` with the adapter (and head) of a finished stage, frozen and in eval mode.

    Raises:
        InputError: the folder is not plain LoRA as safetensors; PEFT would take pickled weights.
    """
    check_adapter(folder)
    return PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device)).eval()


# ---------------------------------------------------------------- all roles on one base


class SharedBase:
    """A frozen base and the roles on it.

    A role is a LoRA adapter and, for reward model and value function, a float32 head. `BASE` is the role without an
    adapter. Everything runs in eval mode, also under gradients: with 8-bit weights train and eval mode compute
    different logits, and the ratio of new to old probabilities would not start at 1.
    """

    def __init__(self, causal: PreTrainedModel, base: recipe.Base, *, checkpointed: bool = False) -> None:
        """checkpointed: layers keep their inputs alone for the way back, and compute the rest again there."""
        self.causal = causal
        self.base = base
        self.trunk: nn.Module = getattr(causal, causal.base_model_prefix)
        self.heads: dict[str, nn.Module] = {}
        self.peft: PeftModel | None = None
        self._layers: list[BaseTunerLayer] = []
        self._trainable: dict[str, dict[str, nn.Parameter]] = {}
        self._active = BASE
        self._takes_positions = takes_positions(self.trunk)
        before = probe_logits(causal)
        self.unpadded = self._takes_positions and unpadded.works(causal, self._padded, SUMMATION_TOLERANCE[base.dtype])
        """Whether its passes are over real tokens alone."""
        layers.multiply_packed(causal, self.trunk)
        if checkpointed:
            layers.compute_again(self.trunk, lambda: self.using(self._active))
        else:
            layers.keep_less(self.trunk, getattr(torch, base.dtype))
        self.output_head = output_head(causal, before)
        """The base's own, which no role changes."""

    @property
    def device(self) -> torch.device:
        return self.causal.device

    @property
    def width(self) -> int:
        """Size of the trunk's hidden states."""
        return int(self.causal.config.get_text_config().hidden_size)

    def add(self, role: str, folder: Path, *, trainable: bool = False) -> dict[str, Tensor]:
        """Add a role whose adapter starts as a copy of the one in `folder`; return the folder's other tensors (heads).

        Raises:
            InputError: the adapter was made for another base.
        """
        config = _shaped_as(folder, self.causal, "CAUSAL_LM")
        if self.peft is None:
            self.peft = get_peft_model(self.causal, config, adapter_name=role)
        else:
            self.peft.add_adapter(role, config)
        heads = _copy_lora(self.peft, role, folder, self.base)
        self._layers = [module for module in self.causal.modules() if isinstance(module, BaseTunerLayer)]
        layers.adapt_in_few_passes(self._layers, role)
        for name, parameter in self.peft.named_parameters():
            if re.search(rf"\.lora_\w+\.{re.escape(role)}(\.weight)?$", name):
                parameter.requires_grad_(trainable)
                if trainable:
                    self._trainable.setdefault(role, {})[name] = parameter
        self.peft.eval()
        self._activate(self._active)
        return heads

    def set_head(self, role: str, head: nn.Module, *, trainable: bool = False) -> None:
        """Give a role its head; a trainable head joins the role's parameters."""
        self.heads[role] = head.requires_grad_(trainable)
        if trainable:
            for name, parameter in head.named_parameters():
                self._trainable.setdefault(role, {})[f"head.{name}"] = parameter

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return every trainable parameter as "role/name", in a fixed order."""
        return {f"{role}/{name}": p for role in sorted(self._trainable) for name, p in self._trainable[role].items()}

    def parameters_of(self, role: str) -> dict[str, nn.Parameter]:
        """Return the trainable parameters of one role."""
        return self._trainable.get(role, {})

    def save(self, role: str, folder: Path) -> None:
        """Write a role's adapter as standard PEFT files, and its head, if any, beside it as `head.safetensors`."""
        assert self.peft is not None
        save_adapter(self.peft, folder, self.base, role)
        if role in self.heads:
            tensors = {name: tensor.detach().cpu() for name, tensor in self.heads[role].state_dict().items()}
            artifacts.write_atomically(folder / "head.safetensors", to_bytes(tensors))

    @contextmanager
    def using(self, role: str) -> Iterator[None]:
        """Run the block with the adapter of `role`; nothing else switches adapters, and nothing else is changed."""
        before = self._active
        if role == before:
            yield
            return
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    @contextmanager
    def decoding(self, role: str) -> Iterator[None]:
        """Run the block, which makes few tokens at a time, with the adapter of `role` and no other in the meantime.

        It is folded into packed weights where there are such.
        """
        with layers.folded(self._layers, role) as folded, self.using(BASE if folded else role):
            yield

    def _activate(self, role: str) -> None:
        for layer in self._layers:
            if role == BASE:
                layer.enable_adapters(False)
            else:
                layer.enable_adapters(True)
                layer.set_adapter(role, inference_mode=True)
        for parameter in self.trainable().values():  # PEFT turns gradients off when it switches; a role keeps its own
            parameter.requires_grad_(True)
        self._active = role

    def hidden(self, role: str, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the trunk's last hidden states [B, T, H] of `ids` [B, T] under a role's adapter.

        mask: [B, T], true for real tokens; rows may be padded on both sides, positions count real tokens.
        """
        with self.using(role):
            return unpadded.states(self.causal, ids, mask) if self.unpadded else self._padded(ids, mask)

    def backward(self, role: str, loss: Tensor) -> None:
        """Add the gradients of a loss that a role's passes made."""
        with self.using(role):  # once, where each layer that is computed again would switch to it and back
            loss.backward()

    def _padded(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.trunk(
            input_ids=ids, attention_mask=mask.long(), use_cache=False, **self.positions(mask)
        ).last_hidden_state

    def room(self, ids: Tensor, mask: Tensor) -> float:
        """Return the memory that a pass over `ids` [B, T] takes, in tokens."""
        return unpadded.room(ids, mask) if self.unpadded else mask.numel()

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Return the keyword for position ids [B, T] that skip padding, or nothing where the trunk takes none."""
        return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)} if self._takes_positions else {}


def takes_positions(trunk: nn.Module) -> bool:
    """Return whether a trunk is told the position of each token."""
    return "position_ids" in inspect.signature(trunk.forward).parameters


def probe_logits(causal: PreTrainedModel) -> Tensor:
    """Return the logits [T, V] that a causal model gives a few tokens."""
    with torch.no_grad():
        return causal(input_ids=_probe(causal), use_cache=False).logits[0]


def _probe(causal: PreTrainedModel) -> Tensor:
    return torch.arange(8, device=causal.device).unsqueeze(0) % causal.config.get_text_config().vocab_size


def output_head(causal: PreTrainedModel, probed: Tensor) -> OutputHead:
    """Return what makes logits [..., V] of a causal model's last hidden states [..., H].

    probed: what the model gave as `probe_logits`, before anything was done to how its layers compute.

    Raises:
        InputError: the logits are more than the trunk's, a plain linear output head and a known adjustment.
    """
    layer = causal.get_output_embeddings()
    if isinstance(layer, nn.Linear) and layer.weight.is_floating_point():
        head = plain_head(causal, layer)
        with torch.no_grad():
            trunk = getattr(causal, causal.base_model_prefix)
            ours = head(trunk(input_ids=_probe(causal), use_cache=False).last_hidden_state[0])
        if torch.allclose(probed, ours, rtol=1e-3, atol=1e-3):
            return head
    raise InputError(
        f"base.model: {type(causal).__name__} makes its logits in a way this version does not know, so it would train "
        "on other probabilities than the model's; use another base."
    )


def plain_head(causal: PreTrainedModel, layer: nn.Linear) -> OutputHead:
    """Return the output head with what the architecture does to its result: Gemma caps, Cohere and Granite scale."""
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return OutputHead(layer.weight.detach(), layer.bias, scale, cap)
