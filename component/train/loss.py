"""The training loss: next-token cross-entropy over learned tokens. The shift by one happens here and nowhere else."""

import torch
from torch.nn.functional import cross_entropy


def learned_positions(target_mask: torch.Tensor) -> torch.Tensor:
    """Positions of one sequence (length,) that predict a learned token: the one after them."""
    return target_mask[1:].nonzero()[:, 0]


class TargetLMLoss:
    """Cross-entropy of learned tokens, each in float32."""

    def __call__(self, logits: torch.Tensor, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """The sum over learned tokens, a float64 scalar. Unlearned positions are left out before the upcast.

        Args:
            logits: (batch, length, vocab); position t predicts token t + 1.
            input_ids: (batch, length).
            target_mask: (batch, length), 1 where a token is learned.
        """
        rows, positions = target_mask[:, 1:].nonzero(as_tuple=True)
        losses = cross_entropy(logits[rows, positions].float(), input_ids[rows, positions + 1], reduction="none")
        return losses.sum(dtype=torch.float64)

    def count_learned(self, target_mask: torch.Tensor) -> torch.Tensor:
        """Learned tokens of each row, (batch,). The first token has nothing to predict it and is not counted."""
        return target_mask[:, 1:].sum(1)
