"""Trains two peers in a process of its own: what the test of ranks launches.

Usage: peers_worker.py FOLDER ROWS, with ROWS a batch on each rank. Writes FOLDER/weights-RANK.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runs import make_trainer
from safetensors.torch import save_file
from tiny import tiny_llama
from transformers import PreTrainedTokenizerFast

from llm_distill.students.peers import Peers


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder.parent / "tokenizer")
    peers = Peers(2)
    options = {"ce_weight": 0.5, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 3}
    trainers = [
        make_trainer(
            folder / str(i),
            tokenizer,
            tiny_llama(i + 1, hidden=16 + 8 * i).double(),
            peers[i],
            per_device_train_batch_size=rows,
            **options,
        )
        for i in range(2)
    ]
    peers.train(trainers)
    weights = {
        f"{i}.{name}": value.clone() for i, t in enumerate(trainers) for name, value in t.model.state_dict().items()
    }
    save_file(weights, folder / f"weights-{trainers[0].accelerator.process_index}.safetensors")


if __name__ == "__main__":
    main()
