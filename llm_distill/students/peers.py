"""Students that teach each other in one run (deep mutual learning, arXiv:1706.00384).

Each has a `DistillationTrainer` of its own, and a thread in which that trains. One thread runs at a time, and they meet
at fixed places, so that every student reads a batch once, nobody steps before all have said what they say of it, and
what comes out does not depend on the machine.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from llm_distill.divergences import Divergence
from llm_distill.heads import LMHead
from llm_distill.models import HEAD, LanguageModel, Needs, kept_in_evaluation, require_same_ids, vocabulary_size
from llm_distill.ranks import SHARDED
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal, MixtureSignal, Signal, mean_of
from llm_distill.teachers.base import Teacher
from llm_distill.teachers.ensemble import EnsembleTeacher

SHARED = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
)
"""Options that must be the same for all, as they read the same batches."""
OUT_OF_STEP = (
    "peers take the same steps, and one of them has ended before the others or has another number of batches. Give all "
    "the same train_dataset, and stop none early."
)


class Peers(Sequence["PeerTeacher"]):
    """Several students, equal or different, of which each learns from what the others say now:

        peers = Peers(2)
        trainers = [DistillationTrainer(model, peers[i], args[i], ...) for i, model in enumerate(models)]
        peers.train(trainers)

    What student k learns from is the mean of the others' distributions. Its forward KL has the gradient of the paper's
    mean of KLs. `args` have `ce_weight`, without which equal students have nothing to learn. Give each its own
    `output_dir`.

    Args:
        count: of students.
        teacher: one beside them all, which reads each batch once. It tells its whole distribution.
        teacher_weight: its share of what each learns from; the other students have the rest.
    """

    def __init__(self, count: int, teacher: Teacher | None = None, teacher_weight: float = 0.5) -> None:
        if count < 1 or (count == 1 and teacher is None):
            raise ValueError(f"{count} students without a teacher have nobody to learn from: Peers are two at least.")
        if not 0 < teacher_weight < 1:
            raise ValueError(f"teacher_weight must be between 0 and 1, got {teacher_weight}.")
        if teacher is not None and teacher.k is not None:
            raise ValueError(f"peers mix full distributions, and a {type(teacher).__name__} has its top k.")
        if isinstance(teacher, EnsembleTeacher) and teacher.mixture == "geometric":
            raise ValueError("peers mix probabilities, and a geometric mean is none: mixture=mean or best.")
        self.teacher, self.teacher_weight = teacher, teacher_weight
        self.meetings: Meetings | None = None
        """There while they train."""
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._teachers = [PeerTeacher(self, index) for index in range(count)]

    def __len__(self) -> int:
        return len(self._teachers)

    def __getitem__(self, index: Any) -> Any:
        return self._teachers[index]

    def train(self, trainers: Sequence[Trainer], resume_from_checkpoint: bool = False) -> list[TrainOutput]:
        """As each trainer's `train`, of all together.

        Args:
            resume_from_checkpoint: go on from the last step of which all have a checkpoint.

        Raises:
            ValueError: trainers that are not of these peers, or will not read the same batches; no such step.
        """
        self._require_together(trainers)
        resumed: list[Any] = _last_common(trainers) if resume_from_checkpoint else [None] * len(trainers)
        if len(trainers) == 1:  # the order of random numbers is then that of any run
            return [trainers[0].train(resume_from_checkpoint=resumed[0])]
        self.meetings = Meetings(len(trainers))
        outputs: list[Any] = [None] * len(trainers)

        def run(index: int) -> None:
            assert self.meetings is not None, "it was made above"
            trainer, callback = trainers[index], MeetAtSteps(self.meetings, index)
            with self.meetings.attended(index):
                set_seed(trainer.args.seed)
                trainer.add_callback(callback)
                try:
                    outputs[index] = trainer.train(resume_from_checkpoint=resumed[index])
                finally:
                    trainer.remove_callback(callback)

        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(trainers))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if self.meetings.error is not None:
                raise self.meetings.error
        except KeyboardInterrupt as interrupt:
            self.meetings.fail(interrupt)
            raise
        finally:
            self.meetings = None
        return outputs

    def _require_together(self, trainers: Sequence[Any]) -> None:
        if [trainer.teacher for trainer in trainers] != self._teachers:
            raise ValueError(
                f"these are {len(self)} peers, and train() takes their trainers in order: teacher=peers[0], peers[1], …"
            )
        for trainer in trainers[1:]:
            for name in SHARED:
                first, other = (getattr(one.args, name) for one in (trainers[0], trainer))
                if first != other:
                    raise ValueError(f"peers read the same batches, and {name} is {first} for one and {other} for one.")
        folders = [Path(trainer.args.output_dir).resolve() for trainer in trainers]
        if len(set(folders)) < len(folders):
            raise ValueError(f"each peer is saved in its own folder, and two have output_dir={folders[0].name}.")
        for trainer in trainers:
            if trainer.policy.writes:
                raise ValueError("peers read the same text, and with on_policy_share each would read its own.")
            if trainer.objective.head.kd_weight == 0:
                raise ValueError("kd_weight is 0: such a peer learns nothing from the others. Train it by itself.")


class PeerTeacher(Teacher):
    """What all others say, to one of them."""

    def __init__(self, peers: Peers, index: int) -> None:
        self.peers, self.index = peers, index
        self.student: nn.Module | None = None
        self.head: LMHead | None = None

    def exchange(self, view: View, own: HiddenSignal) -> Signal:
        """What the others, who are at the same batch, say of it, for what the student itself says."""
        meetings, teacher = self.peers.meetings, self.peers.teacher
        if meetings is None:
            if len(self.peers) > 1:
                raise ValueError("peers are trained together: peers.train(trainers) in place of trainer.train().")
            assert teacher is not None, "one alone has a teacher"
            return teacher.score(view)
        teachers = teacher.score(view) if self.index == 0 and teacher is not None else None
        said = meetings.meet(self.index, "batch", (view.positions.targets, own, teachers))
        if any(not torch.equal(targets, view.positions.targets) for targets, _, _ in said):
            raise ValueError(
                "peers read the same batches, and these are at different ones. Give all the same train_dataset, and "
                "the same seed or data_seed."
            )
        return self._mixture([one for index, (_, one, _) in enumerate(said) if index != self.index], said[0][2])

    def score(self, view: View, needs: Needs = HEAD) -> Signal:
        """What they say when nobody trains: each is read by itself."""
        others = [_read(peer.student, peer.head, view) for peer in self.peers if peer is not self]
        return self._mixture(others, None if self.peers.teacher is None else self.peers.teacher.score(view))

    def _mixture(self, others: Sequence[HiddenSignal], of_teacher: Any) -> Signal:
        if of_teacher is None:
            return mean_of(others)
        if not others:
            return of_teacher
        share = self.peers.teacher_weight
        own = of_teacher.weights if isinstance(of_teacher, MixtureSignal) else (1.0,)
        each = (1 - share) / len(others)
        if isinstance(own, Tensor):
            return MixtureSignal(
                (*of_teacher.members, *others), torch.cat([share * own, own.new_full((len(own), len(others)), each)], 1)
            )
        weights = (*(share * weight for weight in own), *([each] * len(others)))
        return mean_of((*of_teacher.members, *others), weights)

    def check(self, divergence: Divergence, temperature: float) -> None:
        if self.peers.teacher is not None:
            self.peers.teacher.check(divergence, temperature)

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.peers.teacher is not None:
            self.peers.teacher.fit_to(tokenizer)
        if self.peers.tokenizer is None:
            self.peers.tokenizer = tokenizer
        try:
            require_same_ids(self.peers.tokenizer, tokenizer)
        except ValueError as error:
            raise ValueError(f"peers share a tokenizer, and here another is the first peer's: {error}") from error

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        if accelerator.distributed_type in SHARDED:
            raise ValueError("peers do not go with sharded students (FSDP, DeepSpeed): use DDP.")
        if self.peers.teacher is not None:
            self.peers.teacher.prepare(accelerator, student)
        assert self.peers.tokenizer is not None, "fit_to() comes first"
        self.student, self.head = student, LMHead.of(student, vocabulary_size(self.peers.tokenizer))

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        return () if self.peers.teacher is None else self.peers.teacher.models

    @property
    def max_length(self) -> int | None:
        return None if self.peers.teacher is None else self.peers.teacher.max_length

    def summary(self) -> str:
        beside = "" if self.peers.teacher is None else f", and {self.peers.teacher.summary()}"
        return f"{len(self.peers) - 1} other student(s) of the same run{beside}"

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"architecture": "peers", "peers": len(self.peers)}
        if self.peers.teacher is not None:
            described |= self.peers.teacher.describe() | {"peers_teacher_weight": self.peers.teacher_weight}
        return described


class MeetAtSteps(TrainerCallback):
    """Nobody steps before all have their gradients, or evaluates before all have stepped."""

    def __init__(self, meetings: Meetings, index: int) -> None:
        self.meetings, self.index = meetings, index

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.meetings.meet(self.index, "gradients")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.meetings.meet(self.index, "step")


class Meetings:
    """Lets threads run one at a time, in a fixed order, each from one meeting to the next: with its own random numbers,
    and on several ranks with collectives in the same order.
    """

    def __init__(self, count: int) -> None:
        self.error: BaseException | None = None
        self._turn = 0
        self._changed = threading.Condition()
        self._held = [0] * count
        self._given: list[list[Any]] = [[None] * count, [None] * count]
        """Of the last two meetings: who comes first gives to the next while the last still reads this one."""
        self._gone = False

    def meet(self, index: int, what: str, given: Any = None) -> list[Any]:
        """What each has given, once all are here. Raises ValueError if one is somewhere else."""
        if self._gone:
            raise ValueError(OUT_OF_STEP)
        number = self._held[index]
        self._held[index] += 1
        table = self._given[number % 2]
        table[index] = ((number, what), given)
        generators = _random_states()
        with self._changed:
            self._turn = (index + 1) % len(table)
            self._changed.notify_all()
        self._wait(index)
        _restore_random_states(generators)
        if any(given is None or given[0] != (number, what) for given in table):
            raise ValueError(OUT_OF_STEP)
        return [value for _, value in table]

    @contextmanager
    def attended(self, index: int) -> Any:
        """Inside, a thread takes its turns. What it raises ends the others."""
        try:
            self._wait(index)
            yield
        except OtherPeerError:
            return
        except BaseException as error:
            self.fail(error)
            return
        with self._changed:
            self._gone, self._turn = True, (index + 1) % len(self._held)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Ends all."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def _wait(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == index or self.error is not None)
        if self.error is not None:
            raise OtherPeerError


class OtherPeerError(Exception):
    """One of the threads has ended with an error, which is told once."""


def _read(student: nn.Module | None, head: LMHead | None, view: View) -> HiddenSignal:
    """What a student says as it is now, without dropout and a router's noise."""
    if student is None or head is None:
        raise ValueError("the other peers are not there yet: make all trainers before one is evaluated.")
    return HiddenSignal(*kept_in_evaluation(student, head, view))


def _last_common(trainers: Sequence[Any]) -> list[str]:
    """Of each, the checkpoint of the last step of which all have one: a kill may come between two that are saved."""
    folders = [Path(trainer.args.output_dir) for trainer in trainers]
    steps = [
        {
            int(path.parent.name.rpartition("-")[2])
            for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        }
        for folder in folders
    ]
    common = set.intersection(*steps)
    if not common:
        raise ValueError(f"there is no step of which all of {', '.join(map(str, folders))} have a checkpoint.")
    return [str(folder / f"{PREFIX_CHECKPOINT_DIR}-{max(common)}") for folder in folders]


def _random_states() -> tuple[Any, ...]:
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), device


def _restore_random_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])
