"""Writes with vLLM's offline engine, as `llm-distill generate --engine vllm` does, in vLLM's own environment.

`write_with_vllm.py MODEL PROMPTS.json ANSWERS.json`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from llm_distill.generation.engines.base import Sampling
from llm_distill.generation.engines.vllm import VLLMEngine
from llm_distill.generation.prompts import prompts_of

if __name__ == "__main__":
    model, asked, answered = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    sampling = Sampling(max_new_tokens=6, temperature=0)
    engine = VLLMEngine(model, tokenizer, sampling, score=True, dtype="float32", max_model_len=128, enforce_eager=True)
    prompts = prompts_of({"prompt": text} for text in json.loads(Path(asked).read_text()))
    answers = {
        answer.prompt.content: [[written.ids, written.text, written.mean_log_prob] for written in answer.completions]
        or answer.refused
        for answer in engine.write(list(prompts))
    }
    Path(answered).write_text(json.dumps(answers))
