"""Cross-entropy of the learned tokens, in chunks, so that the logits of a whole row never exist."""

from types import ModuleType

import torch

LOGITS = 1 << 27  # elements of logits that exist at a time


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy, a float64 scalar, of (hidden, learned, targets, norm, eps, head, ops, trains).

    Args:
        hidden: (tokens, hidden_size), before the final norm.
        learned: (n,) positions that predict a learned token.
        targets: (n,) the tokens to predict there.
        norm: the final norm's weight, or None.
        head: (vocab, hidden_size), frozen.
        trains: whether a backward will come. The gradient is computed in the forward, chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        learned: torch.Tensor,
        targets: torch.Tensor,
        norm: torch.Tensor | None,
        eps: float,
        head: torch.Tensor,
        ops: ModuleType,
        trains: bool,
    ) -> torch.Tensor:
        chosen = hidden[learned]
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grads = []
        for part, wanted in zip(
            *(values.split(max(LOGITS // len(head), 1)) for values in (chosen, targets)), strict=True
        ):
            normed = part if norm is None else ops.rms_norm(part, norm, eps)[0]
            logits = normed @ head.t()
            loss += ops.cross_entropy_(logits, wanted)
            if trains:
                grad = logits @ head
                grads.append(grad if norm is None else ops.rms_norm_backward(grad, part, norm, eps)[0])
        ctx.tokens = len(hidden)
        ctx.save_for_backward(learned, *grads)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        learned, *grads = ctx.saved_tensors
        chosen = torch.cat(grads)
        total = chosen.new_zeros(ctx.tokens, chosen.shape[1])
        # In float32: a card rounds a factor without dimensions to the other's type, and float16 has no 65,536.
        total[learned] = chosen.float().mul_(grad).to(chosen.dtype)
        return total, *[None] * 7
