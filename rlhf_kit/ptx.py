"""Language modelling on other texts beside PPO, so that the policy forgets less of what it could before.

Every optimizer step of PPO adds the gradient of

    coef * mean over the texts' tokens of -log p(token)

to that of the policy loss, before the two are clipped together. Which texts a step has follows from the seed and the
number of the step alone.

Source: Ouyang et al. 2022 (arXiv 2203.02155), equation 2, whose gamma is `coef`. Theirs, 27.8, stands beside a loss
over whole batches of a full model; ours is a mean per token, as the policy loss is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit.collate import IGNORED, right_pad
from rlhf_kit.generation import derived_seed
from rlhf_kit.maths.logprobs import token_logprobs
from rlhf_kit.models import SharedBase
from rlhf_kit.rollout import logits_held, of_like_length


class PTX:
    """Texts in an endless sequence of shuffled passes, some for every step."""

    def __init__(
        self,
        shared: SharedBase,
        rows: Sequence[Mapping[str, Any]],
        *,
        coef: float,
        batch_size: int,
        pad_id: int,
        seed: tuple[object, ...],
        accelerator: Accelerator,
    ) -> None:
        """rows: {"input_ids", "labels"} of each text, as `tokenise_demonstrations` has them."""
        self.shared, self.rows, self.coef, self.batch_size = shared, rows, coef, batch_size
        self.pad_id, self.seed, self.accelerator = pad_id, seed, accelerator

    def batch(self, step: int) -> list[int]:
        """Return the rows of an optimizer step, over all processes."""
        count = len(self.rows)
        orders: dict[int, list[int]] = {}
        rows = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            lap = position // count
            if lap not in orders:
                generator = torch.Generator().manual_seed(derived_seed(*self.seed, "ptx", lap))
                orders[lap] = torch.randperm(count, generator=generator).tolist()
            rows.append(orders[lap][position % count])
        return rows

    def add_gradients(self, role: str, step: int, size: int) -> Tensor:
        """Add this process's part of the gradients of a step, pieces of at most `size` texts at a time.

        Returns its part of the loss, in nats per token, without `coef`.
        """
        batch = self.batch(step)
        tokens = sum(label != IGNORED for row in batch for label in self.rows[row]["labels"][1:])
        mine = [self.rows[batch[number]] for number in distributed.share(len(batch), self.accelerator)]
        loss = torch.zeros((), dtype=torch.float64, device=self.shared.device)
        if not mine:
            return loss
        ids, mask = right_pad([row["input_ids"] for row in mine], self.pad_id)
        labels, _ = right_pad([row["labels"] for row in mine], IGNORED)
        for piece in of_like_length(mask, range(len(mine)), size):
            columns = int(mask[piece].sum(1).max())
            part = self._loss(role, *(tensor[piece, :columns].to(self.shared.device) for tensor in (ids, mask, labels)))
            (self.coef * part / tokens).backward()
            loss += part.detach().double() / tokens
        return loss

    def _loss(self, role: str, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss of a batch of texts [M, T], in nats; the temperature is 1, as in SFT."""
        states = self.shared.hidden(role, ids, mask)[:, :-1]
        learnt = labels[:, 1:] != IGNORED
        entries = logits_held(self.shared.device)
        return -token_logprobs(states[learnt], self.shared.output_head, ids[:, 1:][learnt], 1.0, entries).sum()
