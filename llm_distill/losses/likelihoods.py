"""How likely a model finds given tokens, without a `[rows, vocab]` tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from llm_distill.divergences import ForwardKL
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss
from llm_distill.models import kept_of
from llm_distill.rows import IGNORED, View


@torch.no_grad()
def token_log_likelihoods(
    model: PreTrainedModel, head: LMHead, ids: Sequence[Sequence[int]], contexts: Sequence[int] | None = None
) -> list[Float[Tensor, " tokens"]]:
    """Log-probability of each token given all before it: nats, float64 on the CPU; one forward for all sequences.

    Args:
        model: with its weights on the device that it runs on.
        head: the model's own, over the tokens that count.
        ids: the tokens of each sequence; they are padded on the right.
        contexts: of each sequence, how many tokens at its beginning are only read and get no figure. Nothing stands
            before the first token, so it never gets one.
    """
    batch_size, longest = len(ids), max(map(len, ids))
    inputs = torch.zeros(batch_size, longest, dtype=torch.long)
    mask, labels = torch.zeros_like(inputs), torch.full_like(inputs, IGNORED)
    for row, (tokens, context) in enumerate(zip(ids, contexts or repeat(1), strict=False)):
        inputs[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[row, : len(tokens)] = 1
        labels[row, context : len(tokens)] = inputs[row, context : len(tokens)]
    batch = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
    view = View.of(batch).to(model.device)
    hidden, targets = kept_of(model, head, view).hidden, view.positions.targets
    _, metrics = fused_head_loss(hidden, head, None, ForwardKL(), kd_weight=0.0, ce_weight=1.0, targets=targets)
    log_p = metrics.get("outside_loss", 0.0) - metrics["ce"]
    lengths = torch.bincount(view.positions.sample.cpu(), minlength=batch_size).tolist()
    return list(log_p.double().cpu().split(lengths))
