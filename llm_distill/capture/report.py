"""How true a cache is: what a student would learn from it, beside what the teacher itself would teach it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from tqdm.auto import tqdm

from llm_distill.cache import manifest as manifests
from llm_distill.cache.methods import Hidden, Method
from llm_distill.cache.store import TeacherCache
from llm_distill.capture.fidelity import ALTERNATIVES, Fidelity, Sample, as_table, explain, fidelity, plot
from llm_distill.capture.run import new_manifest, prepare_teacher, sample_batches, score_view
from llm_distill.data.prepare import PreparedData
from llm_distill.models import LanguageModel
from llm_distill.ranks import SHARDED
from llm_distill.rows import View, examples_of
from llm_distill.signals import HiddenSignal, MixtureSignal
from llm_distill.teachers import Teacher

ROWS, SECONDS = 512, 20
"""On how much, and for how long, the ways to keep what a teacher says are compared, beside the one that was chosen."""


def measure_fidelity(
    teacher: Teacher,
    student: LanguageModel,
    data: PreparedData,
    methods: Sequence[Method],
    *,
    rows: int = 1024,
    texts: int = 64,
    seconds: float = math.inf,
) -> dict[str, Fidelity]:
    """Of each method, by its name, on texts from all over the training data.

    Args:
        student: the place from which gradients are taken.
        rows: enough of them.
        texts: at most.
        seconds: after which no further method is begun; the first is always measured. Half of them are for the texts.
    """
    sample, count, begun = [], 0, time.perf_counter()
    student.fit_to(data.tokenizer)
    student.model.eval().to(data.accelerator.device)
    for _, batch in sample_batches(data, texts, batch_size=1):
        view = View.of_teacher(batch)
        signal = score_view(teacher, data, view)
        with torch.no_grad(), data.accelerator.autocast():
            beside = HiddenSignal(*student.keep(View.of(batch).to(data.accelerator.device)))
        assert isinstance(signal, HiddenSignal | MixtureSignal), "or it could not have been captured"
        sample.append(Sample(list(examples_of(view)), signal, beside))
        count += len(beside)
        if count >= rows or time.perf_counter() - begun > seconds / 2:
            break
    measured: dict[str, Fidelity] = {}
    for method in tqdm(methods, desc="Fidelity", leave=False):
        if not measured or time.perf_counter() - begun < seconds:
            measured[str(method)] = fidelity(method, sample, data.args.loss_temperature, data.args.seed)
    return measured


def report_fidelity(teacher: Teacher, student: LanguageModel, data: PreparedData, cache: TeacherCache) -> None:
    """Prints how true the cache is beside other ways to keep what the teacher says, records it and draws it.

    Raises:
        ValueError: another teacher or tokenizer than the cache's.
    """
    prepare_teacher(teacher, data)
    accelerator, wanted = data.accelerator, new_manifest(teacher, data, cache.method)
    if stale := manifests.changes(cache.manifest, wanted):
        raise ValueError(f"{cache.path} is not of this run's teacher. {'; '.join(stale)}.")
    if accelerator.distributed_type in SHARDED:
        accelerator.print("Its fidelity: `llm-distill inspect`, in one process.")
        return
    if teacher.k is not None:
        accelerator.print(
            "Its fidelity is not measured: that takes the teacher's whole distribution, and this one tells its top k."
        )
        return
    can_keep_hidden = hasattr(teacher, "head")
    others = [other for other in ALTERNATIVES if can_keep_hidden or not isinstance(other, Hidden)]
    chosen = str(cache.method)
    if not accelerator.is_main_process:
        return
    methods = [cache.method, *(other for other in others if str(other) != chosen)]
    measured = measure_fidelity(teacher, student, data, methods, rows=ROWS, seconds=SECONDS)
    table = f"{as_table({chosen: measured[chosen]}).markdown()}\n\n{explain(measured[chosen])}"
    print(f"{table}\n")
    if cache.is_local and not cache.is_downloaded:
        cache.manifest["fidelity"] = {"table": table, **measured[chosen]._asdict()}
        cache.record_contents()
        with suppress(ImportError):
            plot(Path(cache.path, manifests.PLOT_FILE), measured, chosen)
            which = f"{len(measured) - 1} of {len(methods) - 1} other ways"
            print(f"{which} to keep it, by bytes and error: {Path(cache.path, manifests.PLOT_FILE)}")
