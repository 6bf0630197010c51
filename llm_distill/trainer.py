"""`DistillationTrainer`: TRL's `SFTTrainer` with another loss. Wiring only; the method is in the modules it imports."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints
from transformers.utils import is_in_notebook
from trl import SFTTrainer

from llm_distill.check.checks import check_trainer
from llm_distill.check.report import Report
from llm_distill.config import DistillationConfig
from llm_distill.data import checks
from llm_distill.data.completions import CompletionLog, print_completions
from llm_distill.data.counts import StreamCounts, count_rows_left
from llm_distill.data.on_policy import OnPolicy, require_sampled_text
from llm_distill.data.on_policy_rows import add_empty_completions
from llm_distill.data.other_chats import map_ends
from llm_distill.data.other_tokens import AlignedCollator, refuse_unaligned
from llm_distill.data.policy import Policy
from llm_distill.data.prepare import PreparedData, add_teacher_texts, named_evaluation, spread_rows
from llm_distill.data.teacher_of_row import NamesTeacher, has_teacher_of_row, number_teachers
from llm_distill.data.teacher_view import MADE, TwoViews, has_teacher_text, refuse_unread
from llm_distill.data.validate import RowChecks
from llm_distill.heads import LMHead, base_of
from llm_distill.losses.in_forward import LossRequest, add_loss_forward
from llm_distill.losses.metrics import Meter
from llm_distill.losses.objective import Objective
from llm_distill.models import context_length, refuse_past_context, vocabulary_size
from llm_distill.probes import MeasureOnceSharded, require_causal_lm
from llm_distill.publish.folder import written_aside
from llm_distill.publish.hub import hub_errors
from llm_distill.publish.run import RunRecord
from llm_distill.ranks import SHARDED
from llm_distill.rows import SKIPPED, TEACHER_OF_ROW, WRITTEN, View, weigh_rows
from llm_distill.students.build import (
    load_student,
    loading_options_taken,
    require_finite,
    require_student,
    require_supported,
    student_tokenizer,
)
from llm_distill.students.modules import (
    TEXTS,
    add_modules,
    choose_dimensions,
    load_modules,
    model_of,
    modules_set_aside,
    save_modules,
)
from llm_distill.students.saving import require_disk, require_savable
from llm_distill.teachers import Teacher, make_teacher
from llm_distill.teachers.base import TellTeacher
from llm_distill.teachers.ensemble import require_rated
from llm_distill.teachers.other_tokens import OtherTokensTeacher, with_other_tokens

if TYPE_CHECKING:
    from llm_distill.evaluation.report import GapReport


class DistillationTrainer(SFTTrainer):
    """Trains a student to say what its teacher says. Data, PEFT, quantisation and resumption are those of `SFTTrainer`.

    Args:
        model: the student: a model id, a folder, a `PreTrainedModel` or a `PeftModel`.
        teacher: a model id, a folder, a `PreTrainedModel` or a `Teacher`; by default what `args` name. With
            `kd_weight=0` it may be left out; if it is there, evaluation compares with it.
        args: a `DistillationConfig`.
        policy: puts other text into the batches of a step, before their rows are counted; by default what `args` say.
        **sft: everything else that `SFTTrainer` takes: `train_dataset`, `eval_dataset`, `processing_class`,
            `peft_config`, `quantization_config`, `callbacks`, …

    Logs `loss`, its parts `kd` and `ce`, and of the student beside the teacher `kl`, `entropy`, `top1_agreement`,
    `acceptance`, in nats (or shares) per token that counts, over all ranks and micro-batches since the last log;
    `mean_token_accuracy`, `num_tokens` and `tokens_per_second`; `teacher_share`, the share of time in the teacher's
    forward (its head's product is part of the loss), and `data_share`, that of waiting for batches, and so for a
    server's answers; for a mixture of experts `aux_loss`, its router's; with `on_miss=skip` `skipped_share`, of the
    tokens that would count; for a student whose matrix is larger than its vocabulary `outside_mass`. Evaluation adds
    `perplexity` and `teacher_ce`; its `loss` is that of the objective. Over several ranks, packed evaluation batches
    may count the few samples twice that fill up the last batch.

    Raises:
        ValueError: teacher and student that do not fit, data with nothing to learn from, options without effect, a
            `teacher_cache` that lacks one of a few texts that are looked up in it.
    """

    # The loss is divided by the rows of the whole step, so `Trainer` has nothing left to scale.
    loss_is_scaled_for_ga = True
    train_dataset: Any
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher: str | PreTrainedModel | Teacher | None = None,
        args: DistillationConfig | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        policy: Policy | None = None,
        **sft: Any,
    ) -> None:
        args = args if args is not None else DistillationConfig(output_dir="distilled")
        require_student(model, args, sft.get("quantization_config"))
        if sft.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would have no effect: the loss is the distillation objective.")
        if policy is not None and args.on_policy_share:
            raise ValueError(f"on_policy_share={args.on_policy_share} would have no effect: the policy is another.")
        self.objective = Objective.of(args)
        self.policy = policy or (OnPolicy(args, args.seed) if args.on_policy_share else Policy())
        if args.on_policy_share:
            sft["train_dataset"] = add_empty_completions(sft.get("train_dataset"), args.on_policy_share)
        self.run = RunRecord(args, model, teacher)

        # Everything that can be refused is refused before TRL prepares data and creates the output folder.
        tokenizer = student_tokenizer(processing_class, model, args)
        is_collated = sft.get("data_collator") is not None
        self.row_checks = RowChecks(tokenizer, args, sft.pop("formatting_func", None), is_collated)
        train, evaluation = self.row_checks.apply(sft.pop("train_dataset", None), sft.pop("eval_dataset", None))
        needed, trusted = self.objective.uses_teacher, args.trust_remote_code
        self.teacher = make_teacher(teacher, args, is_needed=needed, trust_remote_code=trusted)
        if self.teacher is not None:
            self.teacher = with_other_tokens(self.teacher, tokenizer, args.teacher_alignment)
            if self.is_aligned:
                self.objective = self.objective.align(args.teacher_alignment)
            self.objective.require_served(self.teacher.can, type(self.teacher).__name__)
            require_sampled_text(self.teacher, args)
            divergences = self.objective.head.divergences
            for divergence in divergences[-1:] if self.teacher.k == 0 else divergences:
                self.teacher.check(divergence, self.objective.head.temperature)
            if args.kd_row_weights != "equal":
                require_rated(self.teacher, args.kd_row_weights)
            if args.chat_template_path is None:  # otherwise the tokenizer is not yet the one that is used
                self.teacher.fit_to(tokenizer)
        train, evaluation = add_teacher_texts(tokenizer, args, train, evaluation, self._teachers_tokenizer)
        train, evaluation = number_teachers(getattr(self.teacher, "names", ()), args, train, evaluation)
        self.names_teachers = has_teacher_of_row(train, *named_evaluation(evaluation).values())
        self.reads_more = has_teacher_text(train, *named_evaluation(evaluation).values())
        if self.is_aligned:
            data = [data for data in (train, *named_evaluation(evaluation).values()) if data is not None]
            refuse_unaligned(args, data, self.names_teachers)
        refuse_unread(args, self.teacher is not None and self.reads_more, self.objective.teacher_needs)
        if isinstance(model, str):
            model = load_student(model, args, sft.pop("quantization_config", None), sft.get("peft_config"))
        self.stream_counts = StreamCounts(args)
        with self.row_checks.naming_rows(train, evaluation), loading_options_taken(args):
            sft |= {"train_dataset": self.stream_counts.before(train), "eval_dataset": evaluation}
            super().__init__(model=model, args=args, processing_class=tokenizer, **sft)

        self.train_dataset = self.stream_counts.after(self.train_dataset)
        self.collate: Any = self.data_collator
        self._prepare_student()
        self._prepare_teacher()
        before = {"train": train, **named_evaluation(evaluation)}
        after = {"train": self.train_dataset, **named_evaluation(self.eval_dataset)}
        self.row_counts = count_rows_left(before, after, args)
        self.policy.begin(self.model, self.processing_class, self.teacher, self.data_collator, self.accelerator)
        checks.require_usable(self.data, self.data_collator, self.model, self.teacher)
        self.run.begin(self.model, self.objective, self.teacher, train, self.row_counts.get("train"))
        if args.push_to_hub and self.is_world_process_zero():
            self.run.require_place(self.hub_model_id)
        if self.teacher is not None:
            add_modules(self.model, self.objective, self.teacher, self.accelerator)
            sample = (self.data_collator([row]) for row in spread_rows(self.train_dataset, TEXTS))
            choose_dimensions(self.model, self.objective, self.teacher, sample, self.accelerator)
        self.meter = Meter(self.objective.metrics, self.accelerator.device)
        self.completions: CompletionLog | None = None
        if args.log_completions and isinstance(self.policy, OnPolicy):
            ends, most = set().union(*self.policy.ends.values()), args.num_completions_to_print
            self.completions = CompletionLog(self.processing_class, ends, most, args.report_to)
        self._eval_tally = self.meter.zeros()
        self._context = context_length(self.model)
        self._checkpoints: Path | None = None
        self._train_batch_size: int
        self._learned_rows: Tensor | None = None
        self._show_completions = print_completions
        if is_in_notebook():
            from llm_distill.notebook import show_completions, show_table  # there is an IPython only there

            show_table(self)
            self._show_completions = show_completions

    def _prepare_student(self) -> None:
        """Gives it the loss, once it is known that it can be trained, saved, and read as it will be."""
        require_supported(self.model, self.args.n_gpu, self.padding_free, self.accelerator.parallelism_config)
        head = LMHead.of(self.model, vocabulary_size(self.processing_class))
        add_loss_forward(self.model, head)
        if self.is_world_process_zero():
            require_savable(self.model, self.processing_class)
        collate = self.collate if self.padding_free else None

        def measure() -> None:
            require_causal_lm(self.model, self.model_wrapped, head, collate, self.accelerator)

        if self.accelerator.distributed_type in SHARDED:
            self.add_callback(MeasureOnceSharded(measure))
        else:
            measure()

    def _prepare_teacher(self) -> None:
        """Lets it read what the student reads, where the student is."""
        if self.teacher is None:
            return
        if self.args.chat_template_path is not None:
            self.teacher.fit_to(self.processing_class)  # cloning a template may have added tokens
        self.teacher.prepare(self.accelerator, self.model)
        if self.names_teachers:
            self.collate = NamesTeacher(self.collate)
            self.data_collator: Any = self.collate
        if isinstance(self.teacher, OtherTokensTeacher):
            assert self.teacher.alignment is not None, "it is fitted"
            if self.reads_more:
                map_ends(self.teacher.alignment, spread_rows(self.train_dataset, TEXTS))
            limits = filter(None, (self.args.teacher_max_length, self.teacher.teacher.max_length))
            limit, writes = min(limits, default=None), self.policy.writes
            self.collate = AlignedCollator(self.collate, self.teacher.alignment, limit, writes)
            self.data_collator = self.collate
        elif self.reads_more:
            limits = filter(None, (self.args.teacher_max_length, self.teacher.max_length))
            self.collate = TwoViews(self.collate, min(limits, default=None))
            self.data_collator = self.collate
        if self.padding_free:
            self.teacher.require_documents_apart(self.collate, self.accelerator)
        self.objective = self.objective.fit(base_of(self.model).config, model_of(self.teacher, self.model).config)
        self.add_callback(TellTeacher(self.teacher))
        if self.teacher.reader is not None and self.objective.uses_teacher:
            self.data_collator = checks.ReadingCollator(self.collate, self.teacher.reader)

    @property
    def is_aligned(self) -> bool:
        """Whether the teacher has another tokenizer."""
        return self._teachers_tokenizer is not None

    @property
    def _teachers_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """If it has another one than the student."""
        return self.teacher.tokenizer if isinstance(self.teacher, OtherTokensTeacher) else None

    @property
    def data(self) -> PreparedData:
        """What it trains on and is evaluated on, as `capture` takes it."""
        return PreparedData(
            self.train_dataset,
            named_evaluation(self.eval_dataset),
            self.collate,
            self.processing_class,
            self.args,
            self.accelerator,
            self.row_counts,
            self.stream_counts,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. Raises ValueError in a folder with another run's checkpoints, resumed or not."""
        checkpoint = self.run.require_resumable(resume_from_checkpoint)
        require_finite(self.model)
        require_disk(self.model, self.args)
        self.meter.reset()
        if self.completions is not None:
            self.completions.clear()
        self._learned_rows = None
        self.stream_counts.reset()
        if checkpoint is not None:
            self.policy.load(Path(checkpoint))
            if self.teacher is not None:
                self.teacher.load_state(Path(checkpoint))
        with self.run.at_work():
            try:
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            finally:
                if self.teacher is not None:
                    self.teacher.flush()
                self.stream_counts.warn()
        if self._learned_rows is not None and not self._learned_rows:
            raise ValueError(
                f"nothing was learned in {self.state.global_step} steps: no token of a text counted. Are all labels "
                "masked, or does teacher_cache lack all texts (on_miss=skip)?"
            )
        return output

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As `Trainer.get_train_dataloader`. What a policy will write is read by the teacher afterwards."""
        collate, size = self.data_collator, self._train_batch_size
        if self.policy.writes:
            self.data_collator = self.collate
        self._train_batch_size = size // self.policy.rows_per_row
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._train_batch_size = collate, size

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = sorted({*(self._signature_columns or ()), *MADE, TEACHER_OF_ROW})

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The micro-batches of a step, and over how many rows their loss is a mean, or of which weight: those of every
        rank.
        """
        coming = iter(lambda: list(itertools.islice(epoch_iterator, num_batches)), [])
        with self.meter.in_data:
            batches = self.policy(coming, self.state.global_step)
        if not batches:
            return batches, None
        rows = torch.stack([weigh_rows(batch) for batch in batches]).sum()
        if self._averages_over_ranks:
            rows = self.accelerator.reduce(rows.to(device), "sum")
        rows = (rows.float() if rows.is_floating_point() else rows).to(device)
        self._learned_rows = rows if self._learned_rows is None else self._learned_rows + rows
        return batches, rows.masked_fill(rows == 0, 1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective over this micro-batch's share of `num_items_in_batch` rows (default: over its own rows)."""
        training, view, signal, exchange = self.model.training, View.of(inputs), None, None
        refuse_past_context(view.length, self._context, "the batch", "student")
        if training and self.teacher is not None and self.teacher.exchange is not None:
            exchange = functools.partial(self.teacher.exchange, View.of_teacher(inputs))
        elif self.teacher is not None and (self.objective.uses_teacher or not training):
            with self.meter.in_teacher if training else nullcontext(), self.accelerator.autocast():
                signal = self.teacher.score(View.of_teacher(inputs), self.objective.teacher_needs)

        samples, time = inputs["labels"].shape
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        written = inputs[WRITTEN][view.positions.sample] if WRITTEN in inputs else None
        request = LossRequest(self.objective, view.positions, time, signal, num_items_in_batch, written, exchange)
        outputs = model(**view.inputs, **router, use_cache=False, loss_request=request)
        loss = request.exact(outputs["loss"])
        if num_items_in_batch is not None and self._averages_over_ranks:
            loss = loss * self.accelerator.num_processes  # the engine averages gradients over ranks
        if self.aux_loss_enabled:  # a mean per micro-batch, unlike the rest
            micro_batches = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs["aux_loss"] / micro_batches
        if not torch.isfinite(loss):
            checks.refuse_broken_loss(
                request.metrics, request.signal, view, self.state.global_step, self.processing_class
            )

        skipped = (view.fetched or {}).get(SKIPPED)
        tallies = self.meter.by_sample(request.metrics, view.positions.sample, samples, outputs["aux_loss"], skipped)
        if training and self.completions is not None:
            self.completions.add(self.state.global_step, inputs, view, request.metrics)
        if training:
            self.meter.tally += tallies.sum(0)
            mask = inputs.get("attention_mask")
            self.meter.tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        elif "attention_mask" in inputs:
            self._eval_tally += self.accelerator.gather_for_metrics(tallies).sum(0)
        else:
            self._eval_tally += self.accelerator.reduce(tallies.sum(0), "sum")
        if not return_outputs:
            return loss
        with torch.no_grad():  # somebody wants logits (compute_metrics): they cost a forward of their own
            return loss, model(**view.inputs, use_cache=False)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `SFTTrainer.evaluate`. Raises ValueError for a dataset whose rows cannot be evaluated on."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().evaluate(eval_dataset, *args, **kwargs)
        given = self.row_checks.apply(None, eval_dataset)
        _, checked = add_teacher_texts(self.processing_class, self.args, *given, self._teachers_tokenizer)
        if has_teacher_text(*named_evaluation(checked).values()) and not self.reads_more:
            raise ValueError(
                "the teacher shall read something else than the student in this dataset, and the trainer was built for "
                "data in which it does not: give it as eval_dataset when the trainer is built."
            )
        with self.row_checks.naming_rows(None, checked):
            return super().evaluate(checked, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """As `Trainer._get_grad_norm`, which comes before each optimizer step. Raises ValueError where the step would
        ruin the student; fp16's scaler skips such a step by itself.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and self.accelerator.mixed_precision != "fp16" and not math.isfinite(norm):
            raise ValueError(
                f"the gradients after step {self.state.global_step} are not finite, though the loss is: the step would "
                "ruin the student and is not taken. A lower learning_rate or loss_temperature nearer to 1 may help."
            )
        return norm

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the objective's metrics, each a mean over all tokens that count."""
        began = time.perf_counter()
        self._eval_tally = self.meter.zeros()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        values = self.meter.means(self._eval_tally)
        if "ce" in values:
            if self.objective.head.kd_weight and "kd" not in values:  # the teacher tells nothing of this text
                del output.metrics[f"{metric_key_prefix}_loss"]
            else:
                values["loss"] = self.objective.total(values)
            values["perplexity"] = math.exp(min(values["ce"], 700))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        self.meter.since += time.perf_counter() - began
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the objective's metrics since the last one: with each loss, and when training ends."""
        if "loss" in logs or ("train_loss" in logs and self.meter.tokens):
            logs.update(self.meter.log(self.accelerator))
            logs.update(self.policy.log())
            if self.teacher is not None:
                logs.update(self.teacher.log())
        super().log(logs, start_time)
        if "loss" in logs and self.completions is not None:
            step = self.state.global_step
            if table := self.completions.log(step, self.accelerator):
                self._show_completions(step, table)

    def check(self) -> Report:
        """What can be known before the first step, in seconds: whether all fits together and into memory, how long it
        takes, whether the teacher is better, what the licences ask. Training is afterwards what it would have been.
        """
        report = check_trainer(self)
        self.meter.reset()
        return report

    def report(self, max_texts: int | None = 1000) -> GapReport:
        """What the student, as it is now, is beside its teacher on `eval_dataset` (several are domains): quality,
        likeness, calibration, and where it is furthest off. It shows itself in Jupyter, and is saved beside the
        student, whose card then has it. `llm-distill evaluate` measures more, such as speed and bias.

        Args:
            max_texts: of each dataset, drawn from all over it; None for all.

        Raises:
            ValueError: no evaluation data, a teacher that tells less than its whole distribution, a sharded student.
        """
        from llm_distill.evaluation.report import report_on

        if self.teacher is None or self.eval_dataset is None:
            raise ValueError("a report holds the student against a teacher on an eval_dataset: give both.")
        if self.is_aligned:
            raise ValueError(
                "the report compares token by token, and the teacher has another tokenizer: save the student, and run "
                "`llm-distill evaluate`, which compares them by the byte."
            )
        if self.accelerator.distributed_type in SHARDED:
            raise ValueError("the student is sharded: save it, and run `llm-distill evaluate` on what was saved.")
        report = report_on(
            self.model,
            self.teacher,
            self.data.evaluation,
            collate=self.data_collator,
            tokenizer=self.processing_class,
            batch_size=self.args.per_device_eval_batch_size,
            max_texts=max_texts,
        )
        if self.is_world_process_zero():
            report.save(self.args.output_dir)
        return report

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with a record of the run (`distillation.json`, `run.yaml`) in place of its pickle of
        `args`, which tells local paths, and to load one is to run it. Raises ValueError where it would be written over
        another student, or has weights that are not finite.
        """
        require_finite(self.model)
        folder = Path(output_dir or self.args.output_dir)
        if folder.resolve() != self.run.folder.resolve():
            if not _internal_call:
                self.run.require_own_place(folder)
            super().save_model(output_dir, _internal_call=True)
        else:
            self.run.require_folder()
            with written_aside(folder, self.args.should_save) as aside:
                super().save_model(str(aside), _internal_call=True)
                self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.run.note_stream(self.stream_counts.counts())
            self.run.write(folder, self.state, self.accelerator.num_processes)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoints or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As `Trainer._save_checkpoint`, but under its name only once it is whole, and others are removed then."""
        folder, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with written_aside(folder, self.args.should_save) as self._checkpoints:
            try:
                super()._save_checkpoint(model, trial)
                if not self.args.save_only_model:
                    self.policy.save(self._checkpoints / name)
                    if self.teacher is not None and self.args.should_save:
                        self.teacher.save_state(self._checkpoints / name)
            finally:
                aside, self._checkpoints = self._checkpoints, None
            if self.state.best_model_checkpoint == str(aside / name):
                self.state.best_model_checkpoint = str(folder / name)
                if self.args.should_save:
                    self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with modules_set_aside(self.model) as modules:
            super()._save(output_dir, save_modules(modules, output_dir or self.args.output_dir, state_dict))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with modules_set_aside(self.model) as modules:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_modules(modules, resume_from_checkpoint)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As `Trainer.init_hf_repo`. Raises ValueError where there is no right to write."""
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).name):
            super().init_hf_repo(token, private)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes `README.md` into the output folder: what was distilled from what, how, and how well. `dataset_name` is
        a Hub id; of a local place the last part is told.
        """
        self.run.name_data(dataset_name)
        if self.is_world_process_zero():
            self.run.write_card(self.state, self.accelerator.num_processes, model_name, tags)

    def push_to_hub(
        self, commit_message: str | None = None, blocking: bool = True, **options: Any
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves the student, writes its card and uploads both. The commit, on the first rank.

        Args:
            commit_message: by default "Distilled with llm-distill".
            blocking: otherwise the upload goes on in another thread, and a future of the commit is returned.
            **options: those of `create_model_card` and of `llm_distill.publish.student.prepare_push`, also for what is
                refused.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        title = options.get("model_name")
        self.create_model_card(title, options.pop("dataset_name", None), options.get("tags"))
        if not self.is_world_process_zero():
            return None
        return self.run.push(self.hub_model_id, blocking=blocking, commit_message=commit_message, **options)

    @property
    def _averages_over_ranks(self) -> bool:
        return self.args.average_tokens_across_devices and self.accelerator.num_processes > 1
