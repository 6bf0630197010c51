"""`DistillationTrainer`: TRL's `SFTTrainer` with another loss. Wiring only; the method is in the modules it imports."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, get_last_checkpoint
from transformers.utils import is_in_notebook
from trl import SFTTrainer

from llm_distill.check.checks import check_trainer
from llm_distill.check.report import Report
from llm_distill.config import DistillationConfig
from llm_distill.data import checks as data_checks
from llm_distill.heads import LMHead
from llm_distill.leaks import public_value
from llm_distill.losses.in_forward import Lesson, add_lesson_forward
from llm_distill.losses.metrics import Stopwatch, empty_tally, means, tally_by_sample
from llm_distill.losses.objective import Objective
from llm_distill.models import vocabulary_size
from llm_distill.publish.card import write_model_card
from llm_distill.publish.hub import TAGS, hub_errors
from llm_distill.publish.record import RESUMED, circumstances, require_same_run, run_options, run_record, write_run
from llm_distill.publish.student import push_student, require_place
from llm_distill.rows import SIGNAL, SKIPPED, count_rows, counted_rows
from llm_distill.teachers import CachedTeacher, Teacher, make_teacher

if TYPE_CHECKING:
    from llm_distill.evaluation.report import GapReport


class DistillationTrainer(SFTTrainer):
    """Trains a student to say what its teacher says. Data, PEFT, quantisation and resumption are those of `SFTTrainer`.

    Args:
        model: the student: a model id, a folder, a `PreTrainedModel` or a `PeftModel`.
        teacher: a model id, a folder, a `PreTrainedModel` or a `Teacher`; by default what `args` name. With
            `kd_weight=0` it may be left out; if it is there, evaluation compares with it.
        args: a `DistillationConfig`.
        **sft: everything else that `SFTTrainer` takes: `train_dataset`, `eval_dataset`, `processing_class`,
            `peft_config`, `quantization_config`, `callbacks`, …

    Logs `loss`, its parts `kd` and `ce`, and of the student beside the teacher `kl`, `entropy`, `top1_agreement`,
    `acceptance`, in nats (or shares) per token that counts, over all ranks and micro-batches since the last log;
    `tokens_per_second`; `teacher_share`, the share of time in the teacher's forward (its head's product is part of
    the loss), and `data_share`, that of waiting for batches, and so for a server's answers; for a mixture of experts
    `aux_loss`, its router's; with `on_miss=skip` `skipped_share`, of the tokens that would count. Evaluation adds
    `perplexity` and `teacher_ce`; its `loss` is kd_weight · kd + ce_weight · ce. Over several ranks, packed evaluation
    batches may count the few samples twice that fill up the last batch.

    Raises:
        ValueError: teacher and student that do not fit, data with nothing to learn from, options without effect, a
            `teacher_cache` that lacks one of a few texts that are looked up in it.
    """

    # The loss is divided by the rows of the whole step, so `Trainer` has nothing left to scale.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher: str | PreTrainedModel | Teacher | None = None,
        args: DistillationConfig | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        **sft: Any,
    ) -> None:
        args = args if args is not None else DistillationConfig(output_dir="distilled")
        if not isinstance(args, DistillationConfig):
            raise TypeError(f"args must be a DistillationConfig, got {type(args).__name__}.")
        if not isinstance(model, str | PreTrainedModel | PeftModel):
            raise TypeError(f"model must be a name, a PreTrainedModel or a PeftModel, got {type(model).__name__}.")
        if not isinstance(model, str) and (args.model_init_kwargs or sft.get("quantization_config") is not None):
            raise ValueError("model_init_kwargs and quantization_config would have no effect: the student is loaded.")
        if sft.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would have no effect: the loss is the distillation objective.")
        self.objective = Objective.of(args)
        self._checkpoint_found = _last_checkpoint(args)
        self.command: list[str] | None = None
        self.options = run_options(args, model_name_or_path=_name(model), **_teachers_name(teacher))

        # Everything that can be refused is refused before TRL prepares data and creates the output folder.
        tokenizer = processing_class or _load_tokenizer(model, args)
        self.teacher = make_teacher(teacher, args)
        if self.teacher is not None:
            self.teacher.check(self.objective.divergence, self.objective.temperature)
            if args.chat_template_path is None:  # otherwise the tokenizer is not yet the one that is used
                self.teacher.fit_to(tokenizer)
        super().__init__(model=model, args=args, processing_class=tokenizer, **sft)

        if args.chat_template_path is not None and self.teacher is not None:
            self.teacher.fit_to(self.processing_class)  # cloning a template may have added tokens
        self._head = LMHead.of(self.model, vocabulary_size(self.processing_class))
        add_lesson_forward(self.model, self._head)
        self._refuse_what_would_be_wrong()
        if self.teacher is not None:
            self.teacher.prepare(self.accelerator, self.model)
        for name, dataset in named_datasets(self.train_dataset, self.eval_dataset):
            data_checks.require_rows(dataset, name)
            data_checks.require_length(dataset, name, self.teacher.max_length if self.teacher else None)
        self.model.add_model_tags(TAGS)
        self.collate: Any = self.data_collator
        if self.teacher is not None:
            if self.teacher.reader is not None and self.objective.kd_weight:
                self.data_collator: Any = _Reading(self.collate, self.teacher.reader)
                if isinstance(self.teacher, CachedTeacher) and self.teacher.live is None:
                    for name, dataset in named_datasets(self.train_dataset, self.eval_dataset):
                        data_checks.require_readable(dataset, name, self.data_collator)
            self.add_callback(_FlushTeacher(self.teacher))
        if is_in_notebook():
            _show_table(self)
        revision = (args.model_init_kwargs or {}).get("revision")
        self.record = run_record(self.objective, self.teacher, self.model, revision)
        if hasattr(sft.get("train_dataset"), "__len__"):
            self.record["data.texts"] = len(sft["train_dataset"])
        if args.push_to_hub and self.is_world_process_zero():
            with hub_errors(self.hub_model_id):
                api, known = HfApi(token=args.hub_token), (*RESUMED, "student.")
                require_place(api, self.hub_model_id, self.record, known, revision=args.hub_revision)

        self._in_teacher, self._in_data = Stopwatch(self.accelerator.device), Stopwatch(torch.device("cpu"))
        self._eval_tally = empty_tally(self.accelerator.device)
        self._start_counting()

    def _refuse_what_would_be_wrong(self) -> None:
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError("context and sequence parallelism cut labels apart in time, which is not supported yet.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs and would copy the student by DataParallel, which is not "
                "supported. Start one process a GPU (accelerate launch), or choose one with CUDA_VISIBLE_DEVICES=0."
            )
        peft = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        if self.padding_free and getattr(peft, "is_prompt_learning", False):
            raise ValueError(
                "a learned prompt (prompt or prefix tuning) does not go with packing or padding_free: PEFT drops the "
                "positions, so that the student would read across documents. Use LoRA, or packing=False."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. Raises ValueError in a folder with another run's checkpoints, resumed or not."""
        self.require_resumable(resume_from_checkpoint)
        self._checkpoint_found = None  # from here on, what lies there is ours
        self._start_counting()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self.teacher is not None:
                self.teacher.flush()

    def check(self) -> Report:
        """What can be known before the first step, in seconds: whether all fits together and into memory, how long it
        takes, whether the teacher is better, what the licences ask. Training is afterwards what it would have been.
        """
        report = check_trainer(self)
        self._start_counting()
        return report

    def require_resumable(self, resume_from_checkpoint: str | bool | None) -> None:
        """Raises ValueError if training can neither start nor go on like this in this output folder."""
        if not resume_from_checkpoint and self._checkpoint_found:
            raise ValueError(
                f"{self._checkpoint_found} is of an earlier run. Go on from it with resume_from_checkpoint=True "
                "(--resume_from_checkpoint true), or choose another output_dir."
            )
        if resume_from_checkpoint:
            checkpoint = _last_checkpoint(self.args) if resume_from_checkpoint is True else resume_from_checkpoint
            if checkpoint is None or not os.path.isdir(checkpoint):
                where = f"in {self.args.output_dir}" if checkpoint is None else f"at {checkpoint}"
                raise ValueError(f"there is no checkpoint {where} to resume from.")
            require_same_run(checkpoint, self.record)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with a record of the run (`distillation.json`, `run.yaml`) in place of its pickle of
        `args`, which tells local paths, and to load one is to run it.
        """
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.args.should_save and folder.is_dir():
            self._write_run(folder)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As `Trainer.init_hf_repo`. Raises ValueError where there is no right to write."""
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).name):
            super().init_hf_repo(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        *,
        merge_adapters: bool = False,
        force: bool = False,
        base_model: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> CommitInfo | None:
        """Saves the student, writes its card and uploads both: see `llm_distill.publish.student.push_student`, also for what
        is refused. The commit, on the first rank.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.create_model_card(dataset_name=dataset_name, tags=tags)
        if not self.is_world_process_zero():
            return None
        return push_student(
            self.args.output_dir,
            self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            merge_adapters=merge_adapters,
            private=self.args.hub_private_repo if private is None else private,
            force=force,
            base_model=base_model,
            tags=[tags] if isinstance(tags, str) else tags,
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The micro-batches of a step, and over how many rows their loss is a mean: those of every rank."""
        with self._in_data:
            batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        rows = torch.stack([count_rows(batch["labels"]) for batch in batches]).sum().to(device)
        if self._averages_over_ranks:
            rows = self.accelerator.reduce(rows, "sum")
        return batches, rows.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective over this micro-batch's share of `num_items_in_batch` rows (default: over its own rows)."""
        training = self.model.training
        rows = counted_rows(inputs["labels"])
        signal = None
        if self.teacher is not None and (self.objective.kd_weight > 0 or not training):
            with self._in_teacher if training else nullcontext(), self.accelerator.autocast():
                signal = self.teacher.score(inputs)

        forward_inputs = {name: value for name, value in inputs.items() if name not in ("labels", SIGNAL)}
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        lesson = Lesson(self.objective, rows, inputs["labels"].shape[1], signal, num_items_in_batch)
        outputs = model(**forward_inputs, **router, use_cache=False, lesson=lesson)
        loss = lesson.exact(outputs["loss"])
        if not torch.isfinite(loss):
            data_checks.refuse_broken_signal(signal, inputs, rows, self.state.global_step, self.processing_class)
        if num_items_in_batch is not None and self._averages_over_ranks:
            loss = loss * self.accelerator.num_processes  # the engine averages gradients over ranks
        if self.aux_loss_enabled:  # a mean per micro-batch, unlike the rest
            micro_batches = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs["aux_loss"] / micro_batches

        skipped = inputs.get(SIGNAL, {}).get(SKIPPED)
        tallies = tally_by_sample(lesson.metrics, rows.sample, len(inputs["labels"]), outputs["aux_loss"], skipped)
        if training:
            self._tally += tallies.sum(0)
            self._tokens += (
                inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            )
        elif "attention_mask" in inputs:
            self._eval_tally += self.accelerator.gather_for_metrics(tallies).sum(0)
        else:
            self._eval_tally += self.accelerator.reduce(tallies.sum(0), "sum")
        if not return_outputs:
            return loss
        with torch.no_grad():  # somebody wants logits (compute_metrics): they cost a forward of their own
            return loss, model(**forward_inputs, use_cache=False)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the objective's metrics, each a mean over all tokens that count."""
        began = time.perf_counter()
        self._eval_tally = empty_tally(self.accelerator.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        values = means(self._eval_tally)
        if "ce" in values:
            kd = self.objective.kd_weight * values["kd"] if self.objective.kd_weight else 0.0
            values["loss"] = kd + self.objective.ce_weight * values["ce"]
            values["perplexity"] = math.exp(min(values["ce"], 700))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        self._since += time.perf_counter() - began
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the objective's metrics since the last one."""
        if "loss" in logs:  # of training: those of evaluation carry its name, and the last one is `train_loss`
            elapsed = time.perf_counter() - self._since
            tokens = torch.as_tensor(self._tokens).to(self._tally).reshape(1)
            totals = self.accelerator.reduce(torch.cat([self._tally.flatten(), tokens]), "sum")
            logs.update(means(totals[:-1].view_as(self._tally)))
            logs["tokens_per_second"] = float(totals[-1]) / elapsed
            logs["teacher_share"] = self._in_teacher.reset() / elapsed
            logs["data_share"] = self._in_data.reset() / elapsed
            self._start_counting()
        super().log(logs, start_time)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes `README.md` into the output folder: what was distilled from what, how, and how well. `dataset_name` is
        a Hub id; of a local place the last part is told.
        """
        if dataset_name is not None:
            self.record["data.name"] = public_value(dataset_name)
            if not os.path.exists(dataset_name):
                self.record["run.dataset"] = dataset_name
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._write_run(folder)
            tags = [tags] if isinstance(tags, str) else tags
            name = model_name or (self.args.hub_model_id or folder.absolute().name).split("/")[-1]
            write_model_card(folder, name=name, tags=tags)

    def _write_run(self, folder: Path) -> None:
        how = circumstances(
            self.command, self.state.global_step, self.state.log_history, self.accelerator.num_processes
        )
        write_run(folder, self.record | how, self.options)

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
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError("the student is sharded: save it, and run `llm-distill evaluate` on what was saved.")
        report = report_on(
            self.model,
            self.teacher,
            dict(list(named_datasets(self.train_dataset, self.eval_dataset))[1:]),
            collate=self.data_collator,
            tokenizer=self.processing_class,
            batch_size=self.args.per_device_eval_batch_size,
            max_texts=max_texts,
        )
        if self.is_world_process_zero():
            report.save(self.args.output_dir)
        return report

    @property
    def _averages_over_ranks(self) -> bool:
        return self.args.average_tokens_across_devices and self.accelerator.num_processes > 1

    def _start_counting(self) -> None:
        self._tally = empty_tally(self.accelerator.device)
        self._tokens: Tensor | int = 0
        self._in_teacher.reset()
        self._in_data.reset()
        self._since = time.perf_counter()


class _Reading:
    """A collator that lets a stored teacher put into a batch what it has of it."""

    def __init__(self, collate: Callable[[list[Any]], Any], read: Callable[[Any], Any]) -> None:
        self.collate, self.read = collate, read

    def __call__(self, rows: list[Any]) -> MutableMapping[str, Any]:
        return self.read(self.collate(rows))


class _FlushTeacher(TrainerCallback):
    """A teacher that keeps its answers writes them when the student is saved."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.flush()

    on_epoch_end = on_train_end = on_evaluate = on_predict = on_save


def _show_table(trainer: DistillationTrainer) -> None:
    """In Jupyter the metrics get columns, unless progress is not to be shown."""
    from transformers.utils.notebook import NotebookProgressCallback

    from llm_distill.notebook import NotebookTable  # there is an IPython only there

    if trainer.pop_callback(NotebookProgressCallback) is not None:
        trainer.add_callback(NotebookTable())


def _name(model: Any) -> str:
    return model if isinstance(model, str) else model.config._name_or_path


def _teachers_name(teacher: Any) -> dict[str, str]:
    """As an option, where the argument was given and is one."""
    name = teacher if isinstance(teacher, str) else getattr(getattr(teacher, "config", None), "_name_or_path", None)
    return {"teacher_model_name_or_path": name} if name else {}


def _last_checkpoint(args: DistillationConfig) -> str | None:
    return get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None


def _load_tokenizer(model: Any, args: DistillationConfig) -> PreTrainedTokenizerBase:
    name = _name(model)
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer can be loaded for the student {name!r}: pass processing_class=..., or check the name, "
            f"HF_TOKEN for a gated repository, HF_HUB_OFFLINE. ({error})"
        ) from error


def named_datasets(train: Any, evaluation: Any) -> Iterator[tuple[str, Any]]:
    """All datasets of a trainer, with a name for each."""
    yield "train", train
    if isinstance(evaluation, dict):
        yield from evaluation.items()
    elif evaluation is not None:
        yield "eval", evaluation
