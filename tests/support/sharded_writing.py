"""What a student writes that FSDP2 shards over two ranks, and its gradients afterwards, in a process of its own.

Usage: sharded_writing.py FOLDER KIND, under torchrun, with a tokenizer in FOLDER/tokenizer; KIND is full or lora.
Writes FOLDER/texts-RANK.json, a list of tokens for each prompt, the weights that vLLM would be given on a rank to
FOLDER/weights-RANK, and the gradients of all weights to FOLDER/gradients.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from sharded import fsdp2, gradients, make_batch, make_models, shard_student
from tiny import make_config
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_distill.data.on_policy import OnPolicy
from llm_distill.data.on_policy_rows import rows_of
from llm_distill.generation.writers.vllm import merged_weights
from llm_distill.heads import base_of
from llm_distill.rows import IGNORED, count_rows
from llm_distill.students.gathered import gathered
from llm_distill.students.modules import modules_set_aside
from llm_distill.teachers import LiveTeacher

PROMPTS = [[[7, 8, 9], [5, 6, 7, 8, 9, 10, 11], [20, 21]], []]
"""Of each rank: one has nothing to write."""


def make_pair(kind: str) -> tuple[nn.Module, LiveTeacher]:
    student, teacher = make_models(tied=False)
    if kind == "full":
        return student, teacher
    torch.manual_seed(0)
    adapters = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(student, adapters).double(), teacher


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    lengths = [torch.ones(len(row), dtype=torch.long) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence(lengths, batch_first=True),
    }


def make_policy(student: nn.Module, tokenizer: PreTrainedTokenizerBase, accelerator: Any, folder: Path) -> OnPolicy:
    """Of a student that is not sharded yet, as where a trainer is built."""
    config = make_config(folder, on_policy_share=1.0, max_completion_length=5, sampling_temperature=0.0)
    policy = OnPolicy(config, 0)
    policy.begin(student, tokenizer, None, collate, accelerator)
    return policy


def write_texts(policy: OnPolicy, prompts: list[list[int]]) -> list[list[int]]:
    """What a policy makes of prompts, and they before it."""
    rows = [{"input_ids": [*prompt, 3], "labels": [IGNORED] * len(prompt) + [3]} for prompt in prompts]
    batches = policy(iter([[collate(rows)]] if rows else []), 0)
    return [row["input_ids"] for batch in batches for row in rows_of(batch)]


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    accelerator = Accelerator(cpu=True)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mesh = init_device_mesh("cpu", (ranks,))
    student, teacher = make_pair(kind)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    engine = SimpleNamespace(**vars(fsdp2()), process_index=rank)
    policy = make_policy(student, tokenizer, engine, folder)
    shard_student(student, mesh, tied=False)
    (folder / f"texts-{rank}.json").write_text(json.dumps(write_texts(policy, PROMPTS[rank])))
    with gathered(student, engine), modules_set_aside(student):
        weights = {name: weight.clone() for name, weight in merged_weights(student)}
    save_file(weights, folder / f"weights-{rank}")
    layers = [parameter for layer in base_of(student).model.layers for parameter in layer.parameters()]
    assert all(isinstance(parameter, DTensor) for parameter in layers), "layers are sharded again"

    teacher.prepare(engine, student)
    ids, labels = make_batch()
    mine = slice(2 * rank, 2 * rank + 2)
    found = gradients(student, teacher, ids[mine], labels[mine], ranks, count_rows(labels))
    if rank == 0:
        save_file({name: gradient.contiguous().clone() for name, gradient in found.items()}, folder / "gradients")
    dist.barrier()


if __name__ == "__main__":
    main()
