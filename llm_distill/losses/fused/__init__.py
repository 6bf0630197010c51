"""The fused head loss: from hidden states to the loss and its gradients without a `[rows, vocab]` tensor."""

from llm_distill.losses.fused.head_loss import fused_head_loss

__all__ = ["fused_head_loss"]
