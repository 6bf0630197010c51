"""A pruned student, taught a little, to see what it is worth: the loss before any training misleads."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from llm_distill.divergences import ForwardKL
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss
from llm_distill.models import kept_of
from llm_distill.ranks import has_fast_bfloat16
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal
from llm_distill.students.choose import Blocks

LEARNING_RATE = 4e-4


def heal(student: PreTrainedModel, model: PreTrainedModel, blocks: Blocks) -> None:
    """Teaches it in place, in float32, what the model that it was pruned from says: a step of forward KL on each batch
    of blocks, with AdamW and a learning rate that falls to 0.
    """
    student.float().train()
    heads = [LMHead.of(side) for side in (student, model)]
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(blocks))
    device = student.device.type
    mixed = torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or has_fast_bfloat16())
    for ids in tqdm(blocks, desc="Teaching a shape", unit=" steps", leave=False):
        view = View.of({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}).to(student.device)
        with torch.no_grad():
            signal = HiddenSignal(kept_of(model, heads[1], view).hidden, heads[1])
        with mixed:
            loss, _ = fused_head_loss(kept_of(student, heads[0], view).hidden, heads[0], signal, ForwardKL())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    student.eval()
