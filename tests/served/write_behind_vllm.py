"""Writes as a student whose vLLM is a server on the CPU, in vLLM's own environment; tells what came back as JSON.

Weights travel through NCCL, which a CPU has not: the server has the student's already, and what it would be sent is
noted in place of being sent.

`write_behind_vllm.py STUDENT URL FACTS.json`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from train_with_vllm import PROMPTS, ids_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation.vllm_client import VLLMClient

from llm_distill.generation.engines.base import Sampling
from llm_distill.generation.options import OnPolicyOptions
from llm_distill.generation.writers.transformers import TransformersWriter
from llm_distill.generation.writers.vllm import VLLMWriter


def write(folder: str, url: str) -> dict[str, Any]:
    student, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sent: list[int] = []

    def note(_: VLLMClient, metadata: list[tuple[str, str, list[int]]], weights: Iterator[tuple[str, Tensor]]) -> None:
        given = [(name, str(weight.dtype).removeprefix("torch."), list(weight.shape)) for name, weight in weights]
        assert given == metadata, "what is announced is what is sent"
        sent.append(len(given))

    nothing = dict.fromkeys(("init_communicator", "reset_prefix_cache"), lambda *args, **options: None)
    options = OnPolicyOptions(on_policy_share=1.0, use_vllm=True, vllm_mode="server", vllm_server_base_url=url)
    parts = (student, tokenizer, Sampling(max_new_tokens=12, temperature=0), Accelerator(cpu=True))
    with (
        mock.patch.multiple(VLLMClient, update_named_params=note, **nothing),
        mock.patch.object(VLLMWriter, "_require_possible"),
    ):
        writer = VLLMWriter(*parts, options)
        texts = ids_of(writer.write(PROMPTS, seed=0))
        sent_once = len(sent)
        writer.write(PROMPTS, seed=0)
        with torch.no_grad():
            student.lm_head.weight[0, 0] += 1
        writer.ends.add(texts[0][1])
        (ended,) = writer.write(PROMPTS[:1], seed=0)
        with torch.no_grad():
            student.lm_head.weight[0, 0] -= 1
    return {
        "texts": texts,
        "transformers": ids_of(TransformersWriter(*parts).write(PROMPTS, seed=0)),
        "sent": [sent_once, len(sent)],
        "ended": [ended.ids, ended.finished],
    }


if __name__ == "__main__":
    student, url, facts = sys.argv[1:]
    Path(facts).write_text(json.dumps(write(student, url)))
