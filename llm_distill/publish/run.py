"""The record that a run keeps of itself: what it is, how it went, what others may know of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from huggingface_hub import CommitInfo, HfApi, run_as_future
from peft import PeftModel
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME

from llm_distill.config import DistillationConfig
from llm_distill.data.counts import RowCounts
from llm_distill.files import locked
from llm_distill.leaks import public_value
from llm_distill.losses.objective import Objective
from llm_distill.publish.card import write_model_card
from llm_distill.publish.folder import (
    AT_WORK,
    PARTIAL,
    last_checkpoint,
    require_output_folder,
    require_own,
    require_unused,
    why_torn,
)
from llm_distill.publish.hub import TAGS, hub_errors
from llm_distill.publish.record import (
    FILE,
    IDENTITY,
    RESUMED,
    changes_of_run,
    circumstances,
    require_same_run,
    run_options,
    run_record,
    write_run,
)
from llm_distill.publish.student import prepare_push, require_place
from llm_distill.ranks import run_on_first_rank
from llm_distill.students.build import name_of, revision_of
from llm_distill.teachers import Teacher


class RunRecord:
    """Of one trainer. What it finds in the output folder when training begins is an earlier run's."""

    def __init__(self, args: DistillationConfig, student: Any, teacher: Any) -> None:
        self.args, self.folder = args, Path(args.output_dir)
        self.command: list[str] | None = None
        """By default that of this process."""
        name = teacher if isinstance(teacher, str) else getattr(getattr(teacher, "config", None), "_name_or_path", None)
        given = {"teacher_model_name_or_path": name} if name else {}
        inputs = {"the student": name_of(student), "the teacher": name or args.teacher_model_name_or_path}
        require_output_folder(self.folder, inputs | {"the teacher_cache": args.teacher_cache})
        self.options = run_options(args, model_name_or_path=name_of(student), **given)
        self.record: dict[str, Any] = {}
        self._owns_folder, self._is_at_work = False, False

    def begin(
        self,
        student: PreTrainedModel | PeftModel,
        objective: Objective,
        teacher: Teacher | None,
        data: Any,
        row_counts: RowCounts | None,
    ) -> None:
        """Notes what is distilled from what, before anything is learned."""
        self.record = run_record(objective, teacher, student, revision_of(self.args))
        if hasattr(data, "__len__"):
            self.record["data.texts"] = len(data)
        if row_counts is not None:
            self.record |= {"data.texts_lost": row_counts.lost, "data.texts_cut": row_counts.cut}
        student.add_model_tags(TAGS)

    def note_stream(self, row_counts: RowCounts | None) -> None:
        """What has become of the rows of a stream so far."""
        if row_counts is not None:
            names = {"run.texts": "rows", "run.texts_lost": "lost", "run.texts_cut": "cut"}
            self.record |= {name: getattr(row_counts, field) for name, field in names.items()}

    def name_data(self, name: str | None) -> None:
        """A Hub id, of which the card tells; of a local place the last part."""
        if name is not None:
            self.record["data.name"] = public_value(name)
            if not os.path.exists(name) and public_value(name) == name:
                self.record["run.dataset"] = name

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, no other run writes into the folder. Raises ValueError on every rank if one does."""
        if self._is_at_work:  # for a caller
            yield
            return
        locks: list[filelock.AcquireReturnProxy] = []

        def lock() -> None:
            locks.append(locked(self.folder, AT_WORK))
            shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)  # a kill has left it

        run_on_first_rank(lock)
        self._is_at_work = True
        try:
            yield
        finally:
            self._is_at_work = False
            for held in locks:
                held.lock.release()

    def require_resumable(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint to go on from, if any. Raises ValueError if training can neither start nor go on like this in
        this output folder.
        """
        if not resume_from_checkpoint:
            self.require_folder()
            return None
        if resume_from_checkpoint is True:
            checkpoint, where = last_checkpoint(self.folder), f"checkpoint in {self.folder}"
        else:
            checkpoint, where = Path(resume_from_checkpoint), f"checkpoint at {resume_from_checkpoint}"
        if checkpoint is None or not checkpoint.is_dir():
            raise ValueError(f"there is no {where} to resume from.")
        if reason := why_torn(checkpoint):
            raise ValueError(
                f"{checkpoint} is not whole, so that nothing can be resumed from it: {reason}. "
                "resume_from_checkpoint=True takes the last one that is."
            )
        require_same_run(checkpoint, self.record)
        if not self._owns_folder:
            require_same_run(self.folder, self.record)
            if checkpoint.parent.resolve() != self.folder.resolve() or not (checkpoint / FILE).is_file():
                require_own(self.folder)
        self._owns_folder = True
        return str(checkpoint)

    def require_folder(self) -> None:
        """Raises ValueError if the output folder has what another run has left. Afterwards it is this run's."""
        if not self._owns_folder:
            require_unused(self.folder)
        self._owns_folder = True

    def require_own_place(self, folder: Path) -> None:
        """Raises ValueError, on every rank, if a student that is saved there would take the place of something that is
        not this run's.
        """

        def look() -> None:
            require_own(folder)
            path = folder / FILE
            if path.is_file() and (changes := changes_of_run(path, self.record, IDENTITY, "the folder")):
                raise ValueError(f"{folder} has the student of another run ({changes[0]}). Choose another folder.")

        run_on_first_rank(look)

    def require_place(self, repo_id: str) -> None:
        """Raises ValueError if another run's student is in that repository, or there is no right to write."""
        with hub_errors(repo_id):
            api, compared = HfApi(token=self.args.hub_token), (*RESUMED, "student.")
            require_place(api, repo_id, self.record, compared, revision=self.args.hub_revision)

    def write(self, folder: Path, state: TrainerState, ranks: int) -> None:
        """`distillation.json` and `run.yaml` into a folder with a student, in place of the trainer's pickle."""
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if folder.is_dir():
            how = circumstances(self.command, state.global_step, state.log_history, ranks)
            write_run(folder, self.record | how, self.options)

    def write_card(self, state: TrainerState, ranks: int, name: str | None, tags: str | list[str] | None) -> None:
        """The model card, with the record that it is written from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(self.folder, state, ranks)
        title = name or (self.args.hub_model_id or self.folder.absolute().name).split("/")[-1]
        write_model_card(self.folder, name=title, tags=tags)

    def push(self, repo_id: str | None, *, blocking: bool = True, **options: Any) -> CommitInfo | Future[CommitInfo]:
        """Uploads the folder; options are those of `prepare_push`, by default those of the configuration.

        Args:
            blocking: otherwise another thread uploads, after all that can be refused.
        """
        args = self.args
        defaults = {"private": args.hub_private_repo, "revision": args.hub_revision, "token": args.hub_token}
        given = {name: value for name, value in options.items() if value is not None}
        where = repo_id or args.hub_model_id or self.folder.absolute().name
        upload = prepare_push(self.folder, where, **(defaults | given))
        return upload() if blocking else run_as_future(upload)
