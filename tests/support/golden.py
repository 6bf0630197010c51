"""Three steps of a run of each kind in float64, as numbers: `python golden.py` writes `golden.json` anew.

The numbers are those of the code before it was rearranged. A commit that changes one of them says why.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from families import tiny_model
from launch import WORKER, Run, run_ranks
from peft import LoraConfig
from tiny import VOCAB, make_config, tiny_llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from worker import make_rows

from llm_distill import AdaptersOffTeacher, CachedTeacher, DistillationTrainer, EnsembleTeacher, LiveTeacher, Teacher

NUMBERS = Path(__file__).parents[1] / "equivalence" / "golden.json"
MASKED = [2, 3, 9]
TOP_K_TOKENS = 20
LOGGED = ("loss", "kd", "ce", "kl", "entropy", "top1_agreement", "acceptance", "teacher_ce", "aux_loss", "grad_norm")
"""Rates and shares of time are left out."""


class Sparse(Teacher):
    """What a server gives: the top k of a live teacher, and the mass of the others."""

    k = TOP_K_TOKENS

    def __init__(self, live: LiveTeacher) -> None:
        self.live = live

    def score(self, *args: Any) -> Any:
        from llm_distill.signals import SparseSignal

        signal = self.live.score(*args)
        log_p = signal.head(signal.hidden).log_softmax(-1)
        top, ids = log_p.topk(self.k)
        tail = torch.log1p(-top.exp().sum(-1))
        return SparseSignal(ids, top, tail, VOCAB)

    def describe(self) -> dict[str, Any]:
        return {"model": "sparse"}

    def prepare(self, *args: Any) -> None:
        self.live.prepare(*args)


def golden_tokenizer() -> PreTrainedTokenizerBase:
    """One that does not depend on the corpus, which differs from Python to Python."""
    words = models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w1")


def llama(seed: int, **config: Any) -> PreTrainedModel:
    return tiny_llama(seed, **config).double()


def mixtral() -> PreTrainedModel:
    model = tiny_model("mixtral", seed=1, vocab_size=VOCAB, output_router_logits=True).double()
    model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def live(tokenizer: PreTrainedTokenizerBase, seed: int = 2) -> LiveTeacher:
    return LiveTeacher(llama(seed), tokenizer)


def trained(
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher,
    *,
    student: PreTrainedModel | None = None,
    rows: Dataset | None = None,
    lora: bool = False,
    folder: Path | None = None,
    **config: Any,
) -> DistillationTrainer:
    """Three steps of plain gradient descent, then an evaluation of a few rows."""
    torch.manual_seed(3)
    defaults = {
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.5,
        "train_sampling_strategy": "sequential",
        "per_device_eval_batch_size": 2,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
    }
    trainer = DistillationTrainer(
        model=student if student is not None else llama(1, hidden=16),
        teacher=teacher,
        args=make_config(folder or Path(tempfile.mkdtemp()) / "out", **(defaults | config)),
        train_dataset=make_rows(MASKED) if rows is None else rows,
        eval_dataset=make_rows([]).select(range(5)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
    )
    trainer.train()
    trainer.evaluate()
    return trainer


def cached(tokenizer: PreTrainedTokenizerBase, method: str, **config: Any) -> DistillationTrainer:
    """From what a live teacher's capture has kept."""
    from golden_capture import filled_cache

    with tempfile.TemporaryDirectory() as folder:
        cache = filled_cache(Path(folder), tokenizer, live(tokenizer), method)
        return trained(tokenizer, CachedTeacher(cache), **config)


RUNS: dict[str, Callable[[PreTrainedTokenizerBase], DistillationTrainer]] = {
    "live": lambda t: trained(t, live(t)),
    "live, jsd at T = 2 beside cross-entropy": lambda t: trained(
        t, live(t), divergence="jsd", loss_temperature=2.0, ce_weight=0.5
    ),
    "live, reverse KL over accumulated micro-batches": lambda t: trained(
        t, live(t), divergence="reverse_kl", gradient_accumulation_steps=3
    ),
    "live, packed": lambda t: trained(
        t, live(t), rows=make_rows([]), packing=True, max_length=128, dataset_kwargs=None, ce_weight=0.5
    ),
    "sparse, as a server gives it": lambda t: trained(t, Sparse(live(t)), divergence="skew_reverse_kl", ce_weight=0.3),
    "ensemble": lambda t: trained(t, EnsembleTeacher([live(t, 2), live(t, 4)], [3, 1]), divergence="tvd"),
    "cached top-k": lambda t: cached(t, "top_k", divergence="jsd", ce_weight=0.3),
    "cached hybrid": lambda t: cached(t, "hybrid"),
    "cached hidden states": lambda t: cached(t, "hidden", divergence="alpha_beta"),
    "LoRA student": lambda t: trained(t, live(t), lora=True, ce_weight=0.2),
    "LoRA student, taught by its own base": lambda t: trained(t, AdaptersOffTeacher(), lora=True, ce_weight=1.0),
    "mixture of experts with its router's loss": lambda t: trained(t, live(t), student=mixtral()),
    "cross-entropy alone": lambda t: trained(t, live(t), kd_weight=0.0, ce_weight=1.0),
}
TWO_RANKS = "two ranks with accumulated micro-batches"


def two_ranks(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The numbers of a run on two ranks."""
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "run").mkdir()
    config = {"gradient_accumulation_steps": 2, "ce_weight": 0.5, "learning_rate": 0.5}
    run_ranks(WORKER, str(folder / "run"), json.dumps({"masked": MASKED, "config": config}), ranks=2)
    run = Run(folder / "run")
    return {"history": logged(run.log["history"]), "weights": linear_hash(run.weights())}


def numbers(trainer: DistillationTrainer) -> dict[str, Any]:
    """Losses and metrics of each step and of the evaluation, and a linear hash of the weights."""
    return {"history": logged(trainer.state.log_history), "weights": linear_hash(trainer.model.state_dict())}


def logged(history: list[dict[str, float]]) -> list[dict[str, float]]:
    names = (*LOGGED, *(f"eval_{name}" for name in LOGGED))
    entries = [{name: entry[name] for name in names if name in entry} for entry in history]
    return [entry for entry in entries if entry]


def linear_hash(weights: dict[str, torch.Tensor]) -> float:
    """The sum of all weights with fixed random signs: what rounding moves by little and a wrong step by much."""
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _, weight in sorted(weights.items()):
        signs = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.float64) * 2 - 1
        total += float((weight.double() * signs).sum())
    return total


if __name__ == "__main__":
    found = {name: numbers(run(golden_tokenizer())) for name, run in RUNS.items()}
    with tempfile.TemporaryDirectory() as folder:
        found[TWO_RANKS] = two_ranks(Path(folder), golden_tokenizer())
    NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
