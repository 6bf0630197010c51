"""A teacher that is the last checkpoints of other runs, which learn from this one's (arXiv:1804.03235)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from llm_distill.files import read_json
from llm_distill.heads import LMHead
from llm_distill.models import HEAD, Needs, kept_in_evaluation, vocabulary_size
from llm_distill.probes import Collator
from llm_distill.ranks import SHARDED, run_on_first_rank
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal, Signal, mean_of
from llm_distill.teachers.base import Teacher
from llm_distill.teachers.live import LiveTeacher

logger = logging.getLogger(__name__)

RECORD = "distillation.json"
"""What a run writes into each checkpoint, and that its teacher was of this kind; see `publish.record`."""
KIND = "codistilled"


class Checkpoint(NamedTuple):
    """Where another run was."""

    folder: Path
    saved: float
    """When, in seconds since 1970."""


class CodistilledTeacher(Teacher):
    """The mean of what the other runs say, each as its last whole checkpoint is.

    Co-distillation: the runs are on as many machines, at their own speed, and meet nowhere but in a shared folder.
    What is stale is used, its age is logged as `peer_age`, and a run that has died teaches as it was. Before another
    run has a checkpoint, the student learns from the text alone: its own prediction, whose divergence is 0, stands for
    the teacher's.

    Args:
        folder: holds the output folder of each run.
        own: that of this one, directly in it.
        every: it is looked whether there are newer checkpoints after so many steps.
    """

    def __init__(self, folder: str | Path, own: str | Path, every: int = 20) -> None:
        self.folder, self.own, self.every = Path(folder), Path(own), every
        if self.own.resolve().parent != self.folder.resolve():
            raise ValueError(
                f"teacher_codistilled={folder} holds the output folders of all runs that teach each other, and "
                f"output_dir={own} is not directly in it. Try output_dir={self.folder / self.own.name}."
            )
        self._steps = 0
        self._taken: dict[str, tuple[Checkpoint, LiveTeacher]] = {}
        self._passed_over: set[Path] = set()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._accelerator: Accelerator | None = None
        self._student: nn.Module | None = None
        self._head: LMHead | None = None
        self._require_apart: Callable[[LiveTeacher], None] = lambda peer: None

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        """Raises ValueError for what another kind of run has left in the folder, or one with another tokenizer."""
        if accelerator.distributed_type in SHARDED:
            raise ValueError("teacher_codistilled does not go with sharded students (FSDP, DeepSpeed): use DDP.")
        assert self._tokenizer is not None, "fit_to() comes first"
        self._accelerator, self._student = accelerator, student
        self._head = LMHead.of(student, vocabulary_size(self._tokenizer))
        for name, checkpoint in run_on_first_rank(self._find).items():
            self._take_up(name, checkpoint)

    def require_documents_apart(self, collate: Collator, accelerator: Accelerator) -> None:
        self._require_apart = lambda peer: peer.require_documents_apart(collate, accelerator)
        for _, peer in self._taken.values():
            self._require_apart(peer)

    def exchange(self, view: View, own: HiddenSignal) -> Signal:  # type: ignore[override]
        """What they say, or before anyone can say something what the student itself says."""
        return self._mixture(view) if self._taken else own

    def score(self, view: View, needs: Needs = HEAD) -> Signal:
        if self._taken:
            return self._mixture(view)
        assert self._student is not None, "prepare() comes first"
        assert self._head is not None, "prepare() comes first"
        return HiddenSignal(*kept_in_evaluation(self._student, self._head, view))

    def update(self) -> None:
        self._steps += 1
        if self._steps % self.every:
            return
        for name, checkpoint in run_on_first_rank(self._newer).items():
            try:
                self._take_up(name, checkpoint)
            except (OSError, ValueError) as error:  # such as one that its run has removed meanwhile
                self._passed_over.add(checkpoint.folder)
                logger.warning("%s is passed over: %s", checkpoint.folder, error)

    def log(self) -> dict[str, float]:
        if not self._taken:
            return {"peers": 0}
        oldest = min(checkpoint.saved for checkpoint, _ in self._taken.values())
        return {"peers": len(self._taken), "peer_age": time.time() - oldest}

    def summary(self) -> str:
        return f"the last checkpoints of other runs ({len(self._taken)} are there)"

    def describe(self) -> dict[str, Any]:
        return {"architecture": KIND}

    def _mixture(self, view: View) -> Signal:
        return mean_of([peer.score(view) for _, peer in self._taken.values()])

    def _find(self) -> dict[str, Checkpoint]:
        """The last whole checkpoint of each other run, by the name of its folder. It is there under its name only when
        it is whole.
        """
        newest: dict[str, Checkpoint] = {}
        for folder in sorted(self.folder.glob(f"*/{PREFIX_CHECKPOINT_DIR}-*")):
            if folder.parent.name == self.own.name or folder.parent.name in newest:
                continue
            last = Path(sort_checkpoints(str(folder.parent))[-1])
            kind = read_json(last / RECORD).get("teacher.architecture") if (last / RECORD).is_file() else None
            if kind != KIND:
                raise ValueError(
                    f"{last} is of a run that does not learn from others, so that {self.folder} is not a folder of "
                    "runs that teach each other. Give them a folder of their own."
                )
            newest[folder.parent.name] = Checkpoint(last, (last / RECORD).stat().st_mtime)
        return newest

    def _newer(self) -> dict[str, Checkpoint]:
        try:
            found = self._find()
        except (OSError, ValueError) as error:  # the run goes on with those that it has
            logger.warning("no newer checkpoints are taken up: %s", error)
            return {}
        return {
            name: checkpoint
            for name, checkpoint in found.items()
            if checkpoint.folder not in self._passed_over
            and (name not in self._taken or self._taken[name][0] != checkpoint)
        }

    def _take_up(self, name: str, checkpoint: Checkpoint) -> None:
        assert self._tokenizer is not None, "fit_to() comes first"
        assert self._accelerator is not None, "prepare() comes first"
        assert self._student is not None, "prepare() comes first"
        peer = LiveTeacher.load(str(checkpoint.folder))
        peer.fit_to(self._tokenizer)
        peer.prepare(self._accelerator, self._student)
        self._require_apart(peer)
        self._taken[name] = checkpoint, peer
        age = time.time() - checkpoint.saved
        logger.info("%s teaches from now on as it was at %s, %.0f s ago.", name, checkpoint.folder.name, age)
