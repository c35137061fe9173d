"""The training loss: next-token cross-entropy over learned tokens. The shift by one happens here and nowhere else."""

import torch
from torch.nn.functional import cross_entropy


def learned_positions(target_mask: torch.Tensor) -> torch.Tensor:
    """Positions of one sequence, (length,), whose next token is learned. They predict it."""
    return target_mask[1:].nonzero()[:, 0]


class TargetLMLoss:
    """Cross-entropy of learned tokens, computed in float32."""

    def __call__(self, logits: torch.Tensor, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """Sum the losses of learned tokens, as a float64 scalar. Unlearned positions are left out before the upcast.

        Args:
            logits: (batch, length, vocab); position t predicts token t + 1.
            input_ids: (batch, length).
            target_mask: (batch, length), 1 where a token is learned.
        """
        rows, positions = target_mask[:, 1:].nonzero(as_tuple=True)
        losses = cross_entropy(logits[rows, positions].float(), input_ids[rows, positions + 1], reduction="none")
        return losses.sum(dtype=torch.float64)

    def count_learned(self, target_mask: torch.Tensor) -> torch.Tensor:
        """Count the learned tokens of each row, (batch,). The first token is not counted, as nothing predicts it."""
        return target_mask[:, 1:].sum(1)
