"""Trains a student that vLLM writes for in this process, in vLLM's own environment; tells what it saw as JSON.

`train_with_vllm.py STUDENT TEACHER FACTS.json`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from runs import make_trainer
from transformers import AutoTokenizer

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.generation.engines.base import Completion, Sampling
from llm_distill.generation.writers.transformers import TransformersWriter
from llm_distill.losses.likelihoods import token_log_likelihoods
from llm_distill.models import LanguageModel

PROMPTS = [list(range(5, 5 + length)) for length in (3, 9, 4, 7, 11, 5, 8, 6)]
STEPS = 3
NEW_TOKENS = 12


def train(student: str, teacher: str, folder: Path) -> dict[str, Any]:
    trainer = make_trainer(
        folder,
        AutoTokenizer.from_pretrained(student),
        student,
        LiveTeacher(LanguageModel.load(teacher).model, AutoTokenizer.from_pretrained(student)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False),
        on_policy_share=1.0,
        max_completion_length=NEW_TOKENS,
        use_vllm=True,
        vllm_max_model_length=128,
        learning_rate=0.02,
        max_steps=STEPS,
    )
    writer = trainer.policy.writer
    sent: list[str] = []
    send = writer.vllm.llm.collective_rpc

    def count(method: str, **options: Any) -> Any:
        sent.append(method)
        return send(method, **options)

    writer.vllm.llm.collective_rpc = count
    base = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    random = torch.get_rng_state()
    sampled, again, other = (writer.write([*PROMPTS, *PROMPTS], seed=seed) for seed in (1, 1, 2))
    facts: dict[str, Any] = {
        "sent for three generations of one student": len(sent),
        "random numbers untouched": torch.equal(random, torch.get_rng_state()),
        "same seed, same texts": ids_of(sampled) == ids_of(again),
        "other seed, other texts": ids_of(sampled) != ids_of(other),
        "a prompt twice, two texts": ids_of(sampled)[:8] != ids_of(sampled)[8:],
        "before": compared(trainer),
    }
    sent.clear()
    trainer.train()
    history = trainer.state.log_history
    facts |= {
        "sent in training": len(sent),
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "lengths": [entry["completion_length"] for entry in history if "completion_length" in entry],
        "after": compared(trainer),
        "frozen weights as they were": all(torch.equal(trainer.model.get_parameter(n), v) for n, v in base.items()),
    }
    (first, *_), *_ = facts["after"]["texts"]
    writer.ends.add(first)
    writer.vllm.temperature = 0.0
    ended = writer.write(PROMPTS[:1], seed=0)[0]
    return facts | {"ended by a token of the teacher's": [ended.ids == [first], ended.finished]}


def compared(trainer: DistillationTrainer) -> dict[str, Any]:
    """What vLLM, in bfloat16, writes at temperature 0 and how likely it says that is, beside what the student says."""
    writer = trainer.policy.writer
    writer.send_weights()
    writer.vllm.temperature, writer.vllm.logprobs = 0.0, 0
    _, texts, log_probs, _ = writer.vllm.generate(PROMPTS, None, num_generations=1)
    alone = [writer.write([prompt], seed=0)[0] for prompt in PROMPTS]
    writer.vllm.temperature, writer.vllm.logprobs = 1.0, None
    author = writer.engine.author
    whole = [prompt + list(ids) for prompt, ids in zip(PROMPTS, texts, strict=True)]
    trainer.model.eval()
    expected = token_log_likelihoods(author.model, author.head, whole, contexts=[len(prompt) for prompt in PROMPTS])
    greedy = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
    ours = TransformersWriter(trainer.model, writer.engine.tokenizer, greedy, trainer.accelerator)
    return {
        "texts": [list(ids) for ids in texts],
        "one at a time": ids_of(alone),
        "transformers": ids_of(ours.write(PROMPTS, seed=0)),
        "log_probs": [[one for (one,) in text] for text in log_probs],
        "transformers' log_probs": [values.tolist() for values in expected],
    }


def ids_of(completions: list[Completion]) -> list[list[int] | None]:
    return [completion.ids for completion in completions]


if __name__ == "__main__":
    student, teacher, facts = sys.argv[1:]
    Path(facts).write_text(json.dumps(train(student, teacher, Path(facts).parent)))
