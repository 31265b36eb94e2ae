"""Adapters and reward models as others make them: with PEFT alone, trl's head files, no code of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

AUTO = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}


def make_adapter(folder: Path, model: Path, task: str = "CAUSAL_LM", *, seed: int = 1, **settings: Any) -> Path:
    """Write a PEFT adapter with random weights for a checkpoint; return its folder.

    settings: of LoraConfig; without them rank 6 on two kinds of layer.
    """
    torch.manual_seed(seed)
    more = {"num_labels": 1} if task == "SEQ_CLS" else {}
    base = AUTO[task].from_pretrained(model, **more)
    shape = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, **settings}
    adapted = get_peft_model(base, LoraConfig(task_type=task, **shape))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return folder


def add_value_head(folder: Path, width: int = 64, *, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Put trl's and LLaMA-Factory's head of a reward model beside a causal adapter; return its weight and bias."""
    torch.manual_seed(seed)
    weight, bias = 0.3 * torch.randn(1, width), torch.randn(1)
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, folder / "value_head.safetensors")
    return weight, bias
