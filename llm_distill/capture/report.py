"""How true a cache is: what a student would learn from it, beside what the teacher itself would teach it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from tqdm.auto import tqdm

from llm_distill.cache import manifest as manifests
from llm_distill.cache.methods import Hidden, Method
from llm_distill.cache.store import TeacherCache
from llm_distill.capture.fidelity import ALTERNATIVES, Fidelity, Sample, as_table, fidelity, plot
from llm_distill.capture.run import ask, new_manifest, spread
from llm_distill.files import differences
from llm_distill.heads import LMHead
from llm_distill.models import hidden_of_counted_rows, vocabulary_size
from llm_distill.rows import examples_of
from llm_distill.signals import HiddenSignal, MixtureSignal
from llm_distill.trainer import DistillationTrainer


def measure_fidelity(
    trainer: DistillationTrainer, methods: Sequence[Method], *, rows: int = 1024, batches: int = 8
) -> dict[str, Fidelity]:
    """Of each method, by its name, on texts from all over the training data."""
    head, sample, count = LMHead.of(trainer.model, vocabulary_size(trainer.processing_class)), [], 0
    trainer.model.eval().to(trainer.accelerator.device)
    for _, batch in spread(trainer, batches):
        teacher = ask(trainer, batch)
        with torch.no_grad(), trainer.accelerator.autocast():
            inputs = {n: v.to(trainer.accelerator.device) if isinstance(v, Tensor) else v for n, v in batch.items()}
            student = HiddenSignal(hidden_of_counted_rows(trainer.model, head, inputs), head)
        assert isinstance(teacher, HiddenSignal | MixtureSignal), "or it could not have been captured"
        sample.append(Sample(list(examples_of(batch)), teacher, student))
        count += len(student)
        if count >= rows:
            break
    bar = tqdm(methods, desc="Fidelity", leave=False)
    return {str(each): fidelity(each, sample, trainer.objective.temperature, trainer.args.seed) for each in bar}


def report_fidelity(trainer: DistillationTrainer, cache: TeacherCache) -> None:
    """Prints how true the cache is beside other ways to keep what the teacher says, records it and draws it.

    Raises:
        ValueError: another teacher or tokenizer than the cache's.
    """
    wanted = new_manifest(trainer, cache.method)
    if stale := differences(cache.manifest, {name: wanted[name] for name in manifests.IDENTITY}):
        raise ValueError(f"{cache.path} is not of this run's teacher. {'; '.join(stale)}.")
    if trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        trainer.accelerator.print("Its fidelity: `llm-distill inspect`, in one process.")
        return
    if trainer.teacher is not None and trainer.teacher.k is not None:
        trainer.accelerator.print(
            "Its fidelity is not measured: that takes the teacher's whole distribution, and this one tells its top k."
        )
        return
    can_keep_hidden = hasattr(trainer.teacher, "head")
    others = [other for other in ALTERNATIVES if can_keep_hidden or not isinstance(other, Hidden)]
    chosen = str(cache.method)
    if not trainer.accelerator.is_main_process:
        return
    measured = measure_fidelity(trainer, [cache.method, *(other for other in others if str(other) != chosen)])
    table = as_table({chosen: measured[chosen]}).markdown()
    print(f"{table}\n")
    if cache.is_local and not cache.is_downloaded:
        cache.manifest["fidelity"] = {"table": table, **measured[chosen]._asdict()}
        cache.record_contents()
        with suppress(ImportError):
            plot(Path(cache.path, manifests.PLOT_FILE), measured, chosen)
            print(f"Other ways to keep it, by bytes and error: {Path(cache.path, manifests.PLOT_FILE)}")
