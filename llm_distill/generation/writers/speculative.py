"""Speculative knowledge distillation (Xu et al., 2024, arXiv:2410.11325): the student proposes, the teacher replaces.

The student writes a few tokens. The first that is not among the teacher's top K there is replaced by one of these,
drawn from the teacher's distribution over them, and the student goes on from there. So a weak student's text stays
where its teacher knows its way, and becomes the student's own as it learns.

Here a replacement is drawn from the top K, and in the paper from the whole distribution: so no token of a text is one
that would have been replaced. No cache is kept between blocks: both models read the text again for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill.generation.engines.base import Completion, Sampling
from llm_distill.generation.writers.transformers import TransformersWriter
from llm_distill.losses.likeness import teacher_log_probs
from llm_distill.ranks import SHARDED
from llm_distill.rows import IGNORED, View
from llm_distill.signals import HiddenSignal, MixtureSignal
from llm_distill.teachers import Teacher

TEXTS_AT_A_TIME = 8
"""So many the teacher judges together: each has its whole distribution at every token of a block."""


class SpeculativeWriter(TransformersWriter):
    """The student and its teacher write together. With K the size of the vocabulary the student writes alone, and with
    1 the teacher does, greedily.

    Args:
        teacher: one in memory.
        top_k: K.
        block: how many tokens the student proposes at a time.

    Raises:
        ValueError: a teacher that is asked elsewhere, or models that are sharded.
    """

    def __init__(
        self,
        student: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        accelerator: Accelerator,
        *,
        teacher: Teacher | None,
        top_k: int,
        block: int,
    ) -> None:
        super().__init__(student, tokenizer, sampling, accelerator)
        if teacher is None or teacher.reader is not None or teacher.k is not None:
            raise ValueError("speculative_top_k asks the teacher while the student writes: it must be one in memory.")
        if accelerator.distributed_type in SHARDED:
            raise ValueError("speculative_top_k does not go with sharded models: leave it out, or use DDP.")
        self.teacher, self.sampling, self.top_k, self.block = teacher, sampling, top_k, block

    def write(self, prompts: list[list[int]], seed: int) -> list[Completion]:
        """Each block ends a text, or leaves it longer by one token at least. `extra` says how many were replaced."""
        limit, texts, replaced = self.sampling.max_new_tokens, [list[int]() for _ in prompts], [0] * len(prompts)
        while unfinished := [i for i, text in enumerate(texts) if len(text) < limit and not self.ends & {*text[-1:]}]:
            contexts = [prompts[i] + texts[i] for i in unfinished]
            room = limit - min(len(texts[i]) for i in unfinished)
            if self.max_length is not None:
                room = min(room, self.max_length - max(map(len, contexts)))
            self.engine.sampling = dataclasses.replace(self.sampling, max_new_tokens=min(self.block, room))
            proposals = [proposal.ids or [] for proposal in super().write(contexts, seed)]
            for start in range(0, len(unfinished), TEXTS_AT_A_TIME):
                part = slice(start, start + TEXTS_AT_A_TIME)
                judged = self._judge(contexts[part], proposals[part], seed + start)
                for i, ids, proposal in zip(unfinished[part], judged, proposals[part], strict=True):
                    replaced[i] += ids != proposal[: len(ids)] and len(texts[i]) + len(ids) <= limit
                    texts[i] = (texts[i] + ids)[:limit]
            seed = (seed + len(prompts)) % 2**32
        completions = map(self.engine.cut_after_end, texts)
        return [done._replace(extra={"replaced": n}) for done, n in zip(completions, replaced, strict=True)]

    @torch.no_grad()
    def _judge(self, contexts: Sequence[list[int]], proposals: Sequence[list[int]], seed: int) -> list[list[int]]:
        """What stays of each proposal: up to the first token outside the teacher's top K, which is replaced."""
        pairs = list(zip(contexts, proposals, strict=True))
        ids = [torch.tensor(context + proposal) for context, proposal in pairs]
        labels = [torch.tensor([IGNORED] * len(context) + proposal) for context, proposal in pairs]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
        view = View.of(batch).to(self.accelerator.device)
        with self.accelerator.autocast():
            signal = self.teacher.score(view)
        assert isinstance(signal, HiddenSignal | MixtureSignal), "it is in memory"
        log_p = teacher_log_probs(signal, slice(None))
        top = log_p.topk(min(self.top_k, log_p.shape[-1]))
        targets = view.positions.targets
        is_known = targets < log_p.shape[-1]
        own = log_p.gather(-1, targets.where(is_known, 0)[:, None])[:, 0]
        is_kept = (is_known & (own >= top.values[:, -1])).tolist()
        if self.sampling.temperature > 0:
            q = (top.values / self.sampling.temperature).softmax(-1).cpu()
            drawn = torch.multinomial(q, 1, generator=torch.Generator().manual_seed(seed)).to(top.indices.device)
            others = top.indices.gather(-1, drawn)[:, 0].tolist()
        else:
            others = top.indices[:, 0].tolist()
        judged, row = [], 0
        for proposal in proposals:
            first = next((n for n in range(len(proposal)) if not is_kept[row + n]), None)
            judged.append(proposal if first is None else [*proposal[:first], others[row + first]])
            row += len(proposal)
        return judged
