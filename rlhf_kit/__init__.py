"""RLHF from one recipe: SFT, a reward model and PPO as LoRA adapters on one frozen base.

`run` does what `rlhf-kit run` does; `load` gives the model of a finished stage. Importing this imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_kit.artifacts import __version__

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from rlhf_kit.pipeline import Run

__all__ = ["__version__", "load", "run"]
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported; trl reports every start


def run(
    recipe: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    out: str | Path | None = None,
    *,
    only: str | None = None,
    fresh: bool = False,
) -> Run:
    """Return the finished run of a recipe file, or of a published run hub://OWNER/NAME[@REVISION] made again: its
    folder, summary and manifests.

    overrides: {"stages.ppo.kl_coef": 0.1}, or the command line's strings "stages.ppo.kl_coef=0.1".
    out: the run directory; None is runs/<recipe name>.
    only: a stage; the others must be finished. fresh: start the run directory (with `only`: that stage) anew.

    Raises:
        InputError: recipe, cards, data or base are wrong; nothing was written.
        Interrupted: SIGTERM or SIGINT came; call again to go on.
    """
    from rlhf_kit import pipeline

    return pipeline.run(recipe, overrides or (), Path(out) if out else None, only=only, fresh=fresh)


def load(run_dir: str | Path, stage: str) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer of a finished stage: frozen, ready to generate, or to score for a reward stage.

    Raises:
        InputError: there is no such run, or the stage is not finished or its files were changed.
    """
    from rlhf_kit import pipeline

    return pipeline.load(Path(run_dir), stage)
