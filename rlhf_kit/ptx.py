"""Language modelling on other texts beside PPO, so that the policy forgets less of what it could before.

Every optimizer step of PPO adds the gradient of

    coef * mean over the texts' tokens of -log p(token)

to that of the policy loss, before the two are clipped together. Which texts a step has follows from the seed and the
number of the step alone.

Source: Ouyang et al. 2022 (arXiv 2203.02155), equation 2, whose gamma is `coef`. Theirs, 27.8, stands beside a loss
over whole batches of a full model; ours is a mean per token, as the policy loss is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit.collate import IGNORED, right_pad
from rlhf_kit.generation import derived_seed
from rlhf_kit.maths.logprobs import token_logprobs
from rlhf_kit.models import SharedBase
from rlhf_kit.rollout import in_pieces, logits_held


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
        mine = [batch[number] for number in distributed.share(len(batch), self.accelerator)]
        rows = [self.rows[row] for row in mine]
        loss = torch.zeros((), dtype=torch.float64, device=self.shared.device)
        tokens = learnt_tokens([self.rows[row] for row in batch])
        for part in summed_losses(self.shared, role, rows, self.pad_id, size):
            self.shared.backward(role, self.coef * part / tokens)
            loss += part.detach().double() / tokens
        return loss


@torch.no_grad()
def mean_loss(shared: SharedBase, role: str, rows: Sequence[Mapping[str, Any]], pad_id: int, size: int) -> float:
    """Return a role's loss on texts, in nats per token, by this process alone; `size` of full length at a time."""
    return math.fsum(float(part) for part in summed_losses(shared, role, rows, pad_id, size)) / learnt_tokens(rows)


def learnt_tokens(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return how many tokens of these texts have a loss; the first token of a text has none."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def summed_losses(
    shared: SharedBase, role: str, rows: Sequence[Mapping[str, Any]], pad_id: int, size: int
) -> Iterator[Tensor]:
    """Yield the summed loss of one piece of the texts after the other, in nats; the temperature is 1, as in SFT."""
    if not rows:
        return
    ids, mask = right_pad([row["input_ids"] for row in rows], pad_id)
    labels, _ = right_pad([row["labels"] for row in rows], IGNORED)
    own = range(len(rows))
    for piece in in_pieces(ids, mask, own, size, prompts=own, unpadded=shared.unpadded):
        columns = int(mask[piece].sum(1).max())
        tokens, real, wanted = (tensor[piece, :columns].to(shared.device) for tensor in (ids, mask, labels))
        states = shared.hidden(role, tokens, real)[:, :-1]
        learnt, entries = wanted[:, 1:] != IGNORED, logits_held(shared.device)
        ours = token_logprobs(states[learnt], shared.output_head, tokens[:, 1:][learnt], 1.0, entries)
        yield -ours.sum()
