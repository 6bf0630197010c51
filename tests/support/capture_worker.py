"""Captures a tiny teacher in a process of its own: what the tests of kills and of ranks launch.

Usage: capture_worker.py FOLDER OPTIONS, with OPTIONS as JSON: `pause` (seconds a batch), `fsdp2` (shards the teacher),
`file_limit` (bytes that any file may have, as on a full disk). Prints "captures" when it begins to.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from sharded import fsdp2
from tiny import VOCAB, make_config, tiny_llama
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.cache import TopK
from llm_distill.capture.run import capture

TEXTS, TEXTS_PER_SHARD = 240, 16


class Slow(LiveTeacher):
    pause = 0.0

    def score(self, *args: Any) -> Any:
        time.sleep(self.pause)
        return super().score(*args)


def make_texts(count: int) -> Dataset:
    """Random tokens, every seventh text a copy of the first."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, 40, (), generator=generator))
        rows.append(torch.randint(1, VOCAB, (length,), generator=generator).tolist())
    rows[7::7] = [rows[0]] * len(rows[7::7])
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])


def make_trainer(folder: Path, sharded: bool) -> DistillationTrainer:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder.parent / "tokenizer")
    student, teacher = tiny_llama(1, hidden=16), Slow(tiny_llama(2), tokenizer)
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "per_device_eval_batch_size": 4}
    args = make_config(folder / "out", **options)  # after the models, which ZeRO-3 would make in another way
    if sharded:
        teacher.prepare(fsdp2(), student)
        assert all(isinstance(parameter, DTensor) for parameter in teacher.model.parameters())
    trainer = DistillationTrainer(
        student, teacher, args=args, train_dataset=make_texts(TEXTS), processing_class=tokenizer
    )
    if sharded:
        for state in (trainer.accelerator.state, PartialState()):  # accelerate keeps it in both
            state.distributed_type = DistributedType.FSDP
    return trainer


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    Slow.pause = options.get("pause", 0.0)
    trainer = make_trainer(folder, options.get("fsdp2", False))
    if limit := options.get("file_limit"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    print("captures", flush=True)
    try:
        capture(trainer.teacher, trainer.data, folder / "cache", TopK(8), examples_per_shard=TEXTS_PER_SHARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)  # it held for the log too


if __name__ == "__main__":
    main()
