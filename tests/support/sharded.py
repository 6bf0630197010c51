"""Gradients of a student and a teacher sharded over ranks by FSDP2, in a process of their own.

Usage: sharded.py FILE, under torchrun. Writes the gradients of the whole student to FILE.
The student is wrapped as accelerate wraps it for FSDP2: layers, embedding, (norm, head) and the root, each a unit.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from tiny import VOCAB, tiny_llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_distill.divergences import make_divergence
from llm_distill.heads import LMHead, base_of
from llm_distill.losses.attention import AttentionMaps
from llm_distill.losses.features import HiddenStates
from llm_distill.losses.in_forward import LossRequest, add_loss_forward
from llm_distill.losses.objective import HeadLoss, Objective
from llm_distill.losses.relations import Relations
from llm_distill.probes import require_causal_lm
from llm_distill.rows import View, count_rows
from llm_distill.students.modules import add_modules
from llm_distill.teachers import LiveTeacher

ROWS_OF_RANK = [3, 1]
OBJECTIVE = Objective(
    HeadLoss(make_divergence("jsd"), temperature=2.0, ce_weight=0.5),
    (HiddenStates({1: 2, 2: 1}, weight=0.5), Relations({2: 1}), AttentionMaps({1: 2}, weight=10.0)),
)


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (sum(ROWS_OF_RANK), 12), generator=generator)
    labels = ids.clone()
    labels[0, :7] = -100
    return ids, labels


def shard_student(student: nn.Module, mesh: object, tied: bool) -> None:
    model = base_of(student)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if not tied:
        fully_shard(model.model.embed_tokens, mesh=mesh)
    tail = [model.model.norm, model.model.embed_tokens, model.lm_head] if tied else [model.model.norm, model.lm_head]
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    fully_shard(student, mesh=mesh)


def gradients(
    student: nn.Module, teacher: LiveTeacher, ids: Tensor, labels: Tensor, ranks: int, num_rows: Tensor
) -> dict[str, Tensor]:
    """Two steps' gradients added up, the second with the parameters gathered anew."""
    add_loss_forward(student, LMHead.of(student))
    for _ in range(2):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        view = View.of(batch)
        signal = teacher.score(view, OBJECTIVE.teacher_needs)
        request = LossRequest(OBJECTIVE, view.positions, labels.shape[1], signal, num_rows)
        output = student(input_ids=ids, use_cache=False, loss_request=request)["loss"]
        loss = request.exact(output.to(torch.bfloat16))  # as FSDP2 casts it under mixed precision
        assert torch.equal(loss.detach(), request.value)
        (loss * ranks).backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g) for name, g in grads.items()}


def fsdp2() -> SimpleNamespace:
    """What a trainer's accelerator holds under FSDP2, which accelerate itself refuses to be on a CPU."""
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    precision = {"autocast": nullcontext, "mixed_precision": "no", "device": torch.device("cpu")}
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP, is_fsdp2=True, state=state, torch_device_mesh=None, **precision
    )


def make_models(tied: bool) -> tuple[PreTrainedModel, LiveTeacher]:
    student = tiny_llama(1, hidden=16, tie_word_embeddings=tied).double()
    teacher = LiveTeacher(tiny_llama(2).double())
    add_modules(student, OBJECTIVE, teacher, fsdp2())
    return student, teacher


def main() -> None:
    out, tied = sys.argv[1], sys.argv[2] == "tied"
    accelerator = Accelerator(cpu=True)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mesh = init_device_mesh("cpu", (ranks,))
    student, teacher = make_models(tied)
    shard_student(student, mesh, tied)
    teacher.prepare(fsdp2(), student)
    assert all(isinstance(p, DTensor) for m in (student, teacher.model) for p in m.parameters())

    packs = DataCollatorForLanguageModeling(0, padding_free=True)
    # As before the first step: it changes nothing.
    require_causal_lm(student, student, LMHead.of(student), packs, fsdp2())
    ids, labels = make_batch()
    first = sum(ROWS_OF_RANK[:rank])
    mine = slice(first, first + ROWS_OF_RANK[rank])
    found = gradients(student, teacher, ids[mine], labels[mine], ranks, count_rows(labels))
    if rank == 0:
        save_file({name: gradient.contiguous().clone() for name, gradient in found.items()}, out)
    dist.barrier()


if __name__ == "__main__":
    main()
