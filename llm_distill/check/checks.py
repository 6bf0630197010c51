"""What is looked at before the first step: `trainer.check()` and, before weights are loaded, `check_configurations`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, parse_flag_from_env
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from trl import SFTTrainer

from llm_distill.alignment import Alignment
from llm_distill.check.alignment import alignment_findings
from llm_distill.check.licences import check_licences
from llm_distill.check.memory import MemoryEstimate, estimate_memory, size
from llm_distill.check.report import Finding, Report, merged
from llm_distill.check.sample import (
    TEXTS,
    SampledTexts,
    measure_losses,
    paired_difference,
    read_texts,
    restoring_state,
    sample_rows,
    time_steps,
)
from llm_distill.config import DistillationConfig
from llm_distill.data.checks import longest_sequence
from llm_distill.data.on_policy_rows import prompt_lengths
from llm_distill.data.prepare import spread_rows
from llm_distill.data.teacher_view import IDS
from llm_distill.heads import base_of, output_projection
from llm_distill.loading import find_adapters, load_config, load_tokenizer
from llm_distill.machine import duration, free_memory
from llm_distill.models import bits_of, context_length, millions, require_same_ids, unshared_tokens, vocabulary_size
from llm_distill.ranks import SHARDED
from llm_distill.students.saving import disk_needs

SLACK = {"cpu": 1.5, "accelerator": 1.15}
"""What an allocator may hold, as a multiple of what is alive: measured with glibc's, a rule of thumb elsewhere."""
FEW = 0.05
"""A share of counted positions below which most of a forward teaches nothing."""
MANY = 0.1
"""A share of texts that are cut, or in which nothing counts, above which one may want to know."""
MOST = 0.5
"""A share of written texts that are cut, above which one may want to know."""
OUTSIDE = 0.01
"""A share of the student's mass past its vocabulary that one may want to know of."""
NO_DIVERGENCE = 1e-4
"""Nats a token."""
SIGMAS = 2.0
SHORTEST = 8
"""Tokens of a text, before the data is known."""


def check_trainer(trainer: SFTTrainer) -> Report:
    """Everything that can be said before the first step, in seconds and leaving no trace; the same on all ranks.

    Args:
        trainer: a `DistillationTrainer`.
    """
    findings = [_student(trainer), *_teacher(trainer), _memory(trainer), check_disk(trainer)]
    findings += [*_texts(trainer), *_licences(trainer)]
    if trainer.accelerator.num_processes > 1:
        return merged(gather_object([Report(tuple(findings))]))
    return Report(tuple(findings))


def _student(trainer: SFTTrainer) -> Finding:
    model, args = trainer.model, trainer.args
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]  # ZeRO-3 takes them out
    count, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
    base = base_of(model)
    text = f"{type(base).__name__}, {millions(count)} parameters, {millions(trained)} of them trained"
    if not trained:
        return Finding("red", "student", text, "nothing would be learned: is everything frozen?")
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if args.bf16 or args.fp16 or bits_of(base) or dtypes == {torch.float32}:
        return Finding("green", "student", text)
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return Finding(
        "amber",
        "student",
        f"{text}, in {names} without mixed precision",
        "steps smaller than its precision are lost: dtype=float32 (with bf16 where there is a GPU)",
    )


def _teacher(trainer: SFTTrainer) -> Iterator[Finding]:
    teacher, tokenizer = trainer.teacher, trainer.processing_class
    if teacher is None:
        yield Finding("skipped", "teacher", "there is none: kd_weight=0")
        return
    yield Finding("green", "teacher", teacher.summary())
    if trainer.reads_more:
        lengths = [longest_sequence(trainer.train_dataset, ids) for ids in (IDS, "input_ids")]
        own, students = ["texts of a stream" if length is None else f"up to {length:,} tokens" for length in lengths]
        limit = f"; {trainer.collate.max_length:,} at most" if trainer.collate.max_length else ""
        yield Finding("green", "teacher's text", f"it reads {own}, the student {students}{limit}")
    rows = f"the same ids for the student's {vocabulary_size(tokenizer):,} tokens"
    models = [base_of(trainer.model), *(member.model for member in teacher.models)]
    heads = [output_projection(model).weight for model in models]
    sizes = {len(head) for head in heads if head.dim() == 2 and head.shape[1] > 1 and len(head)}
    padded = f"; output matrices padded to {', '.join(f'{n:,}' for n in sorted(sizes))} rows" if len(sizes) > 1 else ""
    if teacher.alignment is not None:
        yield from alignment_findings(trainer.collate, spread_rows(trainer.train_dataset, TEXTS))
        return
    if any(member.tokenizer is None for member in teacher.models):
        yield Finding(
            "amber",
            "tokenizers",
            "the teacher has none beside its weights, so only the sizes of the vocabularies were compared",
            "LiveTeacher(model, tokenizer), or save its tokenizer into its folder",
        )
    else:
        yield from {_tokens(member.tokenizer, tokenizer, rows + padded): None for member in teacher.models}
    templates = [member.tokenizer.chat_template for member in teacher.models if member.tokenizer is not None]
    if tokenizer.chat_template and any(template != tokenizer.chat_template for template in templates):
        yield Finding(
            "amber",
            "chat template",
            "the teacher's is another, or it has none: it reads conversations in a form that it was not trained on",
            "chat_template_path=TEACHER teaches the student the teacher's",
        )
    elif tokenizer.chat_template:
        yield Finding("green", "chat template", "the teacher's" if templates else "the student's own")


def _tokens(teacher: Any, student: PreTrainedTokenizerBase, text: str) -> Finding:
    unshared = ", ".join(unshared_tokens(teacher, student))
    if not unshared:
        return Finding("green", "tokenizers", text)
    return Finding(
        "amber",
        "tokenizers",
        f"{text}, except {unshared}, which the teacher does not have there",
        "nothing, as long as no text has them",
    )


def _memory(trainer: SFTTrainer) -> Finding:
    model, accelerator = trainer.model, trainer.accelerator
    teachers = trainer.teacher.models if trainer.teacher is not None else ()
    sharded = accelerator.distributed_type in SHARDED
    longest = None if trainer.args.packing else longest_sequence(trainer.train_dataset)
    written, prompts = None, prompt_lengths(trainer.train_dataset) if trainer.policy.writes else None
    if prompts is not None:
        written = int(max(prompts)) + trainer.args.max_completion_length
        longest = written if trainer.args.on_policy_share == 1 else max(written, longest or 0)
    try:
        estimate = estimate_run(
            model.config,
            [member.model.config for member in teachers],
            trainer.args,
            peft_config=model.active_peft_config if isinstance(model, PeftModel) else None,
            dtype=base_of(model).dtype,
            bits=bits_of(base_of(model)),
            teacher_dtypes=[member.model.dtype for member in teachers],
            teacher_bits=[bits_of(member.model) for member in teachers],
            ranks=accelerator.num_processes,
            sharded=sharded,
            device=accelerator.device.type,
            length=longest,
            teacher_length=longest_sequence(trainer.train_dataset, IDS),
            written_length=written,
        )
    except ValueError as error:
        return Finding("amber", "memory", str(error), "watch its first steps")
    there = estimate.teacher_weights + (0 if sharded else estimate.weights)
    return memory_finding(estimate, accelerator.device, loaded=there)


def check_disk(trainer: SFTTrainer) -> Finding:
    """Whether the output folder's disk holds what the run writes."""
    needs = disk_needs(trainer.model, trainer.args)
    todo = "another output_dir, save_total_limit, save_only_model, or save_strategy=no"
    if needs.student > needs.free:
        return Finding("red", "disk", str(needs), todo)
    if needs.student + needs.checkpoints > needs.free:
        return Finding("amber", "disk", f"{needs}: it may fill up before the run ends", todo)
    return Finding("green", "disk", str(needs))


def estimate_run(
    student: PreTrainedConfig,
    teachers: list[PreTrainedConfig],
    args: DistillationConfig,
    *,
    teacher_dtypes: list[Any],
    teacher_bits: list[int | None],
    **options: Any,
) -> MemoryEstimate:
    """As `estimate_memory`, with any number of teachers in memory, one of which runs at a time."""
    estimates = [
        estimate_memory(student, config, args, teacher_dtype=dtype, teacher_bits=bits, **options)
        for config, dtype, bits in zip(teachers, teacher_dtypes, teacher_bits, strict=True)
    ] or [estimate_memory(student, None, args, **options)]
    largest = max(estimates, key=lambda estimate: estimate.total)
    others = sum(estimate.teacher_weights for estimate in estimates) - largest.teacher_weights
    return MemoryEstimate(
        **vars(largest) | {"total": largest.total + others, "teacher_weights": largest.teacher_weights + others}
    )


def memory_finding(estimate: MemoryEstimate, device: torch.device, loaded: int = 0, what: str = "") -> Finding:
    """The estimate against what is free on this rank, of which `loaded` bytes are taken already."""
    free = free_memory(device) + loaded
    slack = SLACK["cpu" if device.type == "cpu" else "accelerator"]
    text = f"{what}{estimate}, of {size(free)} {'RAM' if device.type == 'cpu' else 'on the device'}"
    todo = (
        "activation_checkpointing, a smaller per_device_train_batch_size with more gradient_accumulation_steps, a "
        "smaller max_length, LoRA (use_peft), a teacher in 4 bits or from a cache, or FSDP over more devices"
    )
    if estimate.total > free:
        return Finding("red", "memory", text, todo)
    if estimate.total * slack > free:
        return Finding("amber", "memory", f"{text}: little room for what the allocator holds beside", todo)
    return Finding("green", "memory", text)


def _texts(trainer: SFTTrainer) -> Iterator[Finding]:
    """What is seen of a sample of the data: alone, and with student and teacher. The same on all ranks."""
    sample, failed, runs = SampledTexts(), None, trainer.accelerator.distributed_type not in SHARDED
    try:
        with restoring_state(trainer):
            rows = sample_rows(trainer)
            sample, batches = read_texts(trainer, rows)
            if runs and sample.counted:
                measure_losses(trainer, batches, sample)
                time_steps(trainer, rows, batches, sample)
    except ValueError as error:
        failed = Finding("red", "data", str(error))
    except torch.OutOfMemoryError as error:
        failed = Finding(
            "red", "time", f"a micro-batch of {trainer.args.per_device_train_batch_size} does not fit: {error}"
        )
    samples, failures = zip(*gather_object([(sample, failed)]), strict=True)
    sample = SampledTexts.of_ranks(samples)
    written = trainer.policy.log()
    yield from filter(None, failures)
    if sample.prompts:
        yield from _writing(trainer, sample, written)
    if sample.texts and trainer.args.on_policy_share < 1:
        yield from _data(trainer, sample)
    if not sample.counted or any(failures):
        return
    if runs:
        yield from _losses(trainer, sample)
        yield _time(trainer, sample)
    else:
        yield Finding(
            "skipped",
            "losses, time",
            "not measured: until training starts, no rank has a student that fits to a sharded teacher",
            "llm-distill check in one process, where both fit",
        )


def _data(trainer: SFTTrainer, sample: SampledTexts) -> Iterator[Finding]:
    args, tokenizer = trainer.args, trainer.processing_class
    share = f"{sample.counted / sample.tokens:.1%} of {sample.tokens:,} tokens in {sample.texts:,} texts count"
    masked = "is max_length shorter than the prompts, or does the chat template mark no assistant turn?"
    if not sample.counted:
        yield Finding("red", "what counts", f"{share}: every label is masked", masked)
        return
    if sample.counted < FEW * sample.tokens or sample.silent > MANY * sample.texts:
        text = f"{share}; nothing counts in {sample.silent:,} texts" if sample.silent else share
        yield Finding("amber", "what counts", text, f"the other tokens cost time and teach nothing: {masked}")
    else:
        yield Finding("green", "what counts", share)
    if counts := trainer.row_counts.get("train") or trainer.stream_counts.counts():
        todo = "a larger max_length, or shorter prompts: such rows are left out of the run" if counts.lost else ""
        yield Finding("amber" if counts.lost else "green", "rows", str(counts), todo)
    if args.packing:
        yield Finding("skipped", "cut texts", "not seen in packed rows")
    elif args.max_length and sample.lengths:
        cut = sum(length >= args.max_length for length in sample.lengths)
        text = f"{cut:,} of {len(sample.lengths):,} texts fill max_length={args.max_length}: they are most likely cut"
        if cut > MANY * len(sample.lengths):
            todo = "a larger max_length, or packing=true with packing_strategy=wrapped, which goes on in the next row"
            yield Finding("amber", "cut texts", text, todo)
        else:
            yield Finding("green", "cut texts", text if cut else f"none fills max_length={args.max_length}")
    end = f"{tokenizer.eos_token} (EOS)"
    if sample.ends:
        yield Finding("green", "end of text", f"{end} is taught {sample.ends:,} times in {sample.texts:,} texts")
    elif sample.ends_seen:
        why = (
            ", as where labels are masked by the padding token's id"
            if tokenizer.pad_token_id == tokenizer.eos_token_id
            else ""
        )
        todo = (
            "a pad_token of its own (--pad_token)"
            if tokenizer.pad_token_id == tokenizer.eos_token_id
            else "let the labels include it"
        )
        yield Finding("amber", "end of text", f"{end} is there {sample.ends_seen:,} times and never counts{why}", todo)
    else:
        yield Finding(
            "amber",
            "end of text",
            f"{end} is in none of the texts: the student will not learn to stop",
            "end texts and answers with it; is a chat template's end of turn another token (--eos_token)?",
        )


def _writing(trainer: SFTTrainer, sample: SampledTexts, written: dict[str, float]) -> Iterator[Finding]:
    """What the student writes after, where it would end, and what it wrote of a few prompts."""
    args, tokens, policy = trainer.args, trainer.processing_class, trainer.policy
    known = prompt_lengths(trainer.train_dataset)
    lengths = sample.prompts if known is None else known
    text = (
        f"{len(lengths):,}, of {np.mean(lengths):.0f} tokens and {max(lengths):,} at most, and "
        f"max_completion_length={args.max_completion_length} after each"
    )
    contexts = {"student": context_length(trainer.model), "teacher": trainer.teacher and trainer.teacher.max_length}
    short = [role for role, n in contexts.items() if n and max(lengths) + args.max_completion_length > n]
    if short:
        todo = "a smaller max_completion_length, or leave out the longest prompts"
        yield Finding("red", "prompts", f"{text}: more than the {' and the '.join(short)} can read", todo)
    else:
        yield Finding("green", "prompts", text)
    ends = {who: {tokens.convert_ids_to_tokens(i) for i in sorted(found)} for who, found in policy.ends.items()}
    text = "; ".join(f"{', '.join(names) or 'none'} ({who}'s)" for who, names in ends.items())
    if not any(ends.values()):
        todo = "an eos_token of the tokenizer (--eos_token)"
        yield Finding("red", "end tokens", "none: every text is cut by max_completion_length", todo)
    elif ends.get("teacher") and not ends["teacher"] & ends["student"]:
        todo = "a few steps on the dataset's text (on_policy_share=0) first, which teach it to end a text so"
        yield Finding("amber", "end tokens", f"{text}: the student does not end as the teacher does", todo)
    else:
        yield Finding("green", "end tokens", text)
    if written:
        cut = written["completion_cut_share"]
        text = (
            f"{written['completion_length']:.0f} tokens a text, {written['completion_max_length']:.0f} at most, "
            f"{cut:.0%} of them cut by max_completion_length={args.max_completion_length}"
        )
        todo = (
            "a larger max_completion_length; mask_truncated_completions leaves them out; a student that never ends "
            "learns to by a few steps on the dataset's text"
        )
        yield Finding("amber" if cut > MOST else "green", "written texts", text, todo if cut > MOST else "")


def _losses(trainer: SFTTrainer, sample: SampledTexts) -> Iterator[Finding]:
    if sample.self_divergence:
        largest = max(sample.self_divergence)
        text = f"student beside itself: {largest:.1e} nats a token"
        if largest < NO_DIVERGENCE:
            yield Finding("green", "divergence", text)
        else:
            yield Finding("red", "divergence", f"{text}, and must be 0", "the loss is wrong on this machine: report it")
    tokens = sample.student_tokens
    if tokens and (mass := sample.outside_mass / tokens) > OUTSIDE:
        yield Finding(
            "amber",
            "vocabulary",
            f"the student gives {mass:.1%} of its mass to rows of its matrix that no token has, and may write them",
            "nothing, if its head is trained: the loss includes them (watch outside_mass); otherwise cut its matrix",
        )
    if trainer.args.on_policy_share == 1:
        yield Finding("skipped", "loss", "not compared: every text will be the student's own")
        return
    alone = f"the student's is {sample.student_loss / tokens:.3f} nats a token" if tokens else "nothing counted"
    if trainer.teacher is not None and trainer.teacher.is_student:
        yield Finding("green", "loss", f"{alone}, and at the start the teacher's too")
        return
    if not sample.losses:
        why = "there is no teacher" if trainer.teacher is None else "the teacher tells a part of its distribution"
        yield Finding("skipped", "loss", f"{alone}; {why} to compare with it")
        return
    teacher, student, mean, error = paired_difference(sample.losses)
    text = (
        f"teacher {teacher:.3f}, student {student:.3f} nats a token on {len(sample.losses):,} texts (difference "
        f"{mean:+.3f} ± {SIGMAS * error:.3f}, two standard errors, paired by text)"
    )
    if mean + SIGMAS * error < 0:
        yield Finding("green", "loss", text)
        return
    verdict = "the teacher is worse" if mean - SIGMAS * error > 0 else "the teacher is not clearly better"
    yield Finding(
        "amber",
        "loss",
        f"{text}: {verdict}",
        "a student of such a teacher often ends worse than one of the text alone: a teacher that knows this data, its "
        "own texts (llm-distill generate), or a larger ce_weight",
    )


def _time(trainer: SFTTrainer, sample: SampledTexts) -> Finding:
    args = trainer.args
    writing = sample.writing_seconds * args.gradient_accumulation_steps
    seconds = sorted(sample.seconds)[len(sample.seconds) // 2] * args.gradient_accumulation_steps + writing
    text, steps = f"{seconds:.2g} s a step without the optimizer's", args.max_steps
    if sample.prompts:
        text += f", {writing:.2g} s of them writing"
    if steps <= 0 and isinstance(trainer.train_dataset, Dataset):
        size = args.train_batch_size // trainer.policy.rows_per_row
        batches = math.ceil(len(trainer.train_dataset) / (size * trainer.accelerator.num_processes))
        steps = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
    whole = f", {duration(seconds * steps)} for {steps:,} steps" if steps > 0 else ""
    return Finding("green", "time", text + whole)


def _licences(trainer: SFTTrainer) -> Iterator[Finding]:
    base, teacher = base_of(trainer.model), trainer.teacher
    teachers: list[tuple[str, str | None]] = []
    if teacher is not None and not teacher.is_student:
        teachers = [(member.model.config._name_or_path, member.describe().get("revision")) for member in teacher.models]
        teachers = teachers or [(teacher.describe().get("model") or "", teacher.describe().get("revision"))]
    yield from check_licences((base.config._name_or_path, getattr(base.config, "_commit_hash", None)), teachers)


def check_configurations(
    student: str,
    args: DistillationConfig,
    *,
    revision: str | None = None,
    peft_config: PeftConfig | None = None,
    bits: int | None = None,
    dtype: Any = "float32",
) -> Report:
    """What can be said before weights are loaded: whether student and teacher are there and fit to each other, and
    whether they fit into memory with the shortest of texts.
    """
    findings, configs, tokenizers = [], {}, {}
    named = {"student": (student, revision)}
    if args.teacher_model_name_or_path and not args.teacher_server_url and not args.teacher_cache:
        named["teacher"] = (args.teacher_model_name_or_path, args.teacher_model_revision)
    for role, (name, commit) in named.items():
        options = {"revision": commit, "trust_remote_code": args.trust_remote_code}
        try:
            configs[role] = load_config(name, **options)
            tokenizers[role] = load_tokenizer(name, **options)
        except ValueError as error:
            todo = "check the name, HF_TOKEN for a gated repository, HF_HUB_OFFLINE"
            findings.append(Finding("red", role, str(error), todo))
        else:
            findings.append(
                Finding("green", role, f"{configs[role].model_type}: configuration and tokenizer are there")
            )
    if len(tokenizers) == 2:
        try:
            require_same_ids(tokenizers["teacher"], tokenizers["student"])
            same = "the same ids for the student's tokens"
            findings.append(_tokens(tokenizers["teacher"], tokenizers["student"], same))
        except ValueError as error:
            findings.append(_aligned(tokenizers, args, error))
    if "student" in configs:
        if find_adapters(student, revision=revision) is not None:
            peft_config = PeftConfig.from_pretrained(student, revision=revision)
            peft_config.inference_mode = False
        findings.append(_least_memory(configs, args, peft_config, bits, dtype))
    findings += check_licences(named["student"], [named["teacher"]] if "teacher" in named else [])
    return Report(tuple(findings))


def _aligned(tokenizers: dict[str, PreTrainedTokenizerBase], args: DistillationConfig, error: ValueError) -> Finding:
    """Of tokenizers that give other ids, for which `error` would refuse them."""
    if args.teacher_alignment == "none":
        return Finding("red", "tokenizers", str(error))
    try:
        alignment = Alignment(tokenizers["student"], tokenizers["teacher"])
    except ValueError as cause:
        return Finding("red", "tokenizers", str(cause))
    share = len(alignment.shared) / alignment.student.size
    return Finding("green", "tokenizers", f"they differ and are aligned by bytes; {share:.0%} of the tokens are shared")


def _least_memory(
    configs: dict[str, PreTrainedConfig], args: DistillationConfig, peft_config: Any, bits: int | None, dtype: Any
) -> Finding:
    assert isinstance(args.teacher_model_init_kwargs, dict), "DistillationConfig has parsed it"
    is_sharded = any(parse_flag_from_env(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED"))
    try:
        estimate = estimate_memory(
            configs["student"],
            configs.get("teacher"),
            args,
            peft_config=peft_config,
            dtype=dtype,
            bits=bits,
            teacher_dtype=args.teacher_model_init_kwargs.get("dtype", "auto"),
            teacher_bits=4 if args.teacher_load_in_4bit else 8 if args.teacher_load_in_8bit else None,
            ranks=args.world_size,
            sharded=is_sharded,
            device=args.device.type,
            length=SHORTEST,
        )
    except ValueError as error:
        return Finding("amber", "memory", str(error), "watch its first steps")
    return memory_finding(estimate, args.device, what=f"with texts of {SHORTEST} tokens, ")
