"""What the student minimises: a list of terms, of which divergence and cross-entropy, on the same logits, are one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm_distill.divergences import Divergence, ForwardKL, make_divergence
from llm_distill.losses.attention import AttentionMaps
from llm_distill.losses.cross_tokenizer import aligned_head_loss
from llm_distill.losses.features import HiddenStates
from llm_distill.losses.fused import fused_head_loss
from llm_distill.losses.fused.head_loss import weight_of_rows
from llm_distill.losses.layers import options_of
from llm_distill.losses.likeness import measure_likeness
from llm_distill.losses.metrics import METRICS
from llm_distill.losses.options import ObjectiveOptions
from llm_distill.losses.relations import Relations
from llm_distill.losses.rkd import RelationalKD
from llm_distill.losses.selectivity import Selectivity
from llm_distill.models import HEAD, Kept, Needs
from llm_distill.rows import Positions
from llm_distill.signals import AlignedSignal, Signal, TokenSignal

Losses = tuple[Float[Tensor, ""], dict[str, Float[Tensor, " rows"]]]
"""A loss, summed over rows and divided by their number in the whole step, and what it was made of, per row."""


class Term(Protocol):
    """One part of the objective: a frozen dataclass whose fields a person may set. `layers.LayerTerm` is its base."""

    @property
    def name(self) -> str:
        """As `losses` and the logs call it."""

    @property
    def weight(self) -> float:
        """What it is multiplied by."""

    def fit(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> Self:
        """The same for two models. Raises ValueError if it cannot be between them."""

    @property
    def student_needs(self) -> Needs:
        """What the student's forward must keep for it."""

    @property
    def teacher_needs(self) -> Needs:
        """What the teacher must tell for it."""

    def make_module(self, student: PreTrainedModel, width: int) -> nn.Module | None:
        """What it trains beside the student, if anything; `width` is that of the teacher's hidden states. It is saved
        with checkpoints and no part of the student.
        """

    def __call__(
        self, student: Kept, signal: Any, positions: Positions, module: nn.Module | None
    ) -> Float[Tensor, " rows"]:
        """Its value at each position, without its weight. The signal is a `HiddenSignal` with what was needed."""


TERMS: dict[str, type[Any]] = {
    term.name: term for term in (HiddenStates, AttentionMaps, Relations, Selectivity, RelationalKD)
}
"""Those that can stand beside the head's loss, by the name that `losses` gives them."""


@dataclass(frozen=True)
class HeadLoss:
    """kd_weight · T² · D(teacher‖student at T) + ce_weight · cross-entropy: see `fused_head_loss`.

    Text that the student wrote may have a divergence of its own, as in DistiLLM-2 (arXiv:2503.07067), and has no
    cross-entropy: whoever imitates its own samples learns to be surer of whatever it says.
    """

    divergence: Divergence
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    squared_temperature: bool = True
    kd_row_weights: str = "equal"
    """How much the divergence weighs in a row, by what the teacher thinks there."""
    on_policy_divergence: Divergence | None = None
    """On what the student wrote; None for the same."""
    alignment: str | None = None
    """How a teacher of other tokens is compared, of `cross_tokenizer.METHODS`; None where it has the same."""
    buffer_mib: int | None = None
    """Memory for logits, which changes how fast it goes and not what comes out."""

    @property
    def divergences(self) -> tuple[Divergence, ...]:
        """All that a teacher must serve; the last is that on what the student wrote."""
        return (self.divergence, *filter(None, [self.on_policy_divergence]))

    def __call__(
        self,
        student: Kept,
        signal: Signal | None,
        positions: Positions,
        num_rows: Tensor | int | None,
        written: Bool[Tensor, " rows"] | None = None,
    ) -> Losses:
        """Over N positions, of which the student `written` the text of some. Where both kinds differ in what is
        minimised, each goes through the fused loss by itself; a value that only one of them has is NaN for the other.
        """
        on_policy = replace(self, divergence=self.on_policy_divergence or self.divergence, ce_weight=0.0)
        is_one = not (self.ce_weight or isinstance(signal, TokenSignal)) and self.divergence == on_policy.divergence
        num_written = 0 if written is None or is_one else int(written.sum())
        if written is None or num_written == 0:
            return self._of_dataset(student, signal, positions, num_rows)
        if num_written == len(written):
            return on_policy._fused(student, signal, positions, num_rows)
        num_rows = weight_of_rows(len(positions.targets), positions.weights) if num_rows is None else num_rows
        loss, all_values = torch.zeros((), device=written.device), dict[str, Tensor]()
        with ExitStack() as gathered:
            for member in () if signal is None else signal.members:  # once, as by a rank whose rows are of one origin
                gathered.enter_context(member.head.weights())
            for head, rows in ((self._of_dataset, ~written), (on_policy._fused, written)):
                part = student._replace(hidden=student.hidden[rows]), None if signal is None else signal.select(rows)
                part_loss, values = head(*part, positions.select(rows), num_rows)
                loss = loss + part_loss
                for name, value in values.items():
                    whole = all_values.setdefault(name, value.new_full(rows.shape, math.nan))
                    whole[rows] = value
        return loss, all_values

    def _of_dataset(
        self, student: Kept, signal: Signal | None, positions: Positions, num_rows: Tensor | int | None
    ) -> Losses:
        """On text that the student did not write, of which a teacher of single tokens can teach nothing."""
        if not isinstance(signal, TokenSignal):
            return self._fused(student, signal, positions, num_rows)
        loss, values = self._fused(student, None, positions, num_rows)
        return loss, values | {"teacher_ce": -signal.log_probs}

    def _fused(
        self, student: Kept, signal: Signal | None, positions: Positions, num_rows: Tensor | int | None
    ) -> Losses:
        if isinstance(signal, AlignedSignal):
            assert self.alignment is not None, "whoever aligns tokens says how they are compared"
            return aligned_head_loss(
                student.hidden,
                student.head,
                signal,
                self.alignment,
                self.divergence,
                targets=positions.targets,
                row_weights=positions.weights,
                kd_weight=self.kd_weight,
                ce_weight=self.ce_weight,
                num_rows=num_rows,
                buffer_mib=self.buffer_mib,
            )
        return fused_head_loss(
            student.hidden,
            student.head,
            signal,
            self.divergence,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            targets=positions.targets,
            row_weights=positions.weights,
            num_rows=num_rows,
            squared_temperature=self.squared_temperature,
            kd_row_weights=self.kd_row_weights,
            buffer_mib=self.buffer_mib,
        )


@dataclass(frozen=True)
class Objective:
    """The head's loss and the weighted sum of further terms, per row that counts."""

    head: HeadLoss
    terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, config: ObjectiveOptions) -> Objective:
        """Raises ValueError for a term that there is not, or parameters that it does not take."""
        assert isinstance(config.divergence_kwargs, dict), "it is parsed"
        assert isinstance(config.on_policy_divergence_kwargs, dict), "likewise"
        on_policy = config.on_policy_divergence
        head = HeadLoss(
            divergence=make_divergence(config.divergence, **config.divergence_kwargs),
            on_policy_divergence=None
            if on_policy is None
            else make_divergence(on_policy, **config.on_policy_divergence_kwargs),
            temperature=config.loss_temperature,
            kd_weight=config.kd_weight,
            ce_weight=config.ce_weight,
            squared_temperature=config.squared_temperature,
            kd_row_weights=config.kd_row_weights,
            buffer_mib=config.loss_buffer_mib,
        )
        assert not isinstance(config.losses, str), "likewise"
        terms = tuple(make_term(**term) for term in config.losses or ())
        names = [term.name for term in terms]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"losses has {repeated[0]!r} twice: give it all its layers at once.")
        return cls(head, terms)

    def fit(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> Objective:
        """The same for two models, with pairs of layers in place of rules. Raises ValueError as its terms do."""
        return replace(self, terms=tuple(term.fit(student, teacher) for term in self.terms))

    def align(self, method: str) -> Objective:
        """The same for a teacher of other tokens; `method` is `teacher_alignment`, and auto is `prefix`.

        Raises:
            ValueError: a temperature, a divergence or a term that cannot be between other tokens.
        """
        method = "prefix" if method == "auto" else method
        head = replace(self.head, alignment=method)
        if head.temperature != 1:
            raise ValueError(
                f"loss_temperature={head.temperature}: a teacher with another tokenizer is compared by how likely "
                "pieces of text are too, which is so at temperature 1 alone. Leave it at 1."
            )
        if head.kd_row_weights != "equal":
            raise ValueError(
                f"kd_row_weights={head.kd_row_weights}: a teacher with another tokenizer has other rows, of which it "
                "is sure or not. Leave it at equal."
            )
        others = sorted({repr(one) for one in head.divergences if not isinstance(one, ForwardKL)})
        if method != "prefix" and others:
            raise ValueError(
                f"teacher_alignment={method} has a measure of its own, and {', '.join(others)} would have no effect: "
                "leave the divergence out, or set teacher_alignment=prefix, which takes any."
            )
        if self.terms:
            raise ValueError(
                f"losses has {self.terms[0].name!r}, which compares states token by token, and the teacher has another "
                "tokenizer: leave that term out."
            )
        return replace(self, head=head)

    @property
    def uses_teacher(self) -> bool:
        """Whether anything is learned from a teacher, and not from the text alone."""
        return self.head.kd_weight > 0 or bool(self.terms)

    @property
    def student_needs(self) -> Needs:
        return _union(term.student_needs for term in self.terms)

    @property
    def teacher_needs(self) -> Needs:
        return _union(term.teacher_needs for term in self.terms)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what is logged of it."""
        return (*METRICS, *(term.name for term in self.terms))

    def require_served(self, can: frozenset[str], teacher: str) -> None:
        """Raises ValueError if a term needs of the teacher what it cannot give."""
        for term in self.terms:
            if missing := set(term.teacher_needs) - can:
                raise ValueError(
                    f"losses has {term.name!r}, which needs the teacher's {' and '.join(sorted(missing))} states, and "
                    f"a {teacher} gives none: use one teacher in memory, or leave that term out. (What a cache "
                    "of cache_method=hidden tells serves layers=head.)"
                )

    def make_modules(self, student: PreTrainedModel, width: int) -> nn.ModuleDict:
        """What its terms train beside the student, by their names; `width` is that of the teacher's hidden states."""
        modules = {term.name: term.make_module(student, width) for term in self.terms}
        return nn.ModuleDict({name: module for name, module in modules.items() if module is not None})

    def values_of_terms(
        self, student: Kept, signal: Signal, positions: Positions, modules: nn.ModuleDict | None
    ) -> dict[str, Float[Tensor, " rows"]]:
        """Of each term by its name, without its weight; `modules` are what `make_modules` has made."""
        of_term = dict(modules.items()) if modules is not None else {}
        return {term.name: term(student, signal, positions, of_term.get(term.name)) for term in self.terms}

    def total(self, means: Mapping[str, float]) -> float:
        """The loss, from the means of its parts."""
        head = self.head.ce_weight * means["ce"]  # with the share of what is past the vocabulary in it
        if self.head.kd_weight:
            head += self.head.kd_weight * (means["kd"] + means.get("outside_loss", 0.0))
        return head + sum(term.weight * means[term.name] for term in self.terms)

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON."""
        record = asdict(self.head) | {"divergence": repr(self.head.divergence)}
        del record["buffer_mib"]  # how it is computed, not what
        if self.head.kd_row_weights == "equal":
            del record["kd_row_weights"]
        if self.head.alignment is None:
            del record["alignment"]
        if record.pop("on_policy_divergence") is not None:
            record["on_policy_divergence"] = repr(self.head.on_policy_divergence)
        if self.terms:
            record["losses"] = [{"name": term.name, **asdict(term)} for term in self.terms]  # type: ignore[call-overload]
        return record

    def __call__(
        self,
        student: Kept,
        signal: Signal | None,
        positions: Positions,
        num_rows: Tensor | int | None = None,
        modules: nn.ModuleDict | None = None,
        written: Bool[Tensor, " rows"] | None = None,
    ) -> Losses:
        """The loss over N positions, and its parts per row.

        Args:
            num_rows: what the sum over rows, each times its weight, is divided by (default: the rows at hand, or their
                weights' sum). A trainer passes those of the whole step over micro-batches and ranks.
            modules: what `make_modules` has made, wherever an engine keeps it.
            written: whether the student wrote the text of each position (None: of none).
        """
        loss, values = self.head(student, signal, positions, num_rows, written)
        if signal is None:
            return loss, values
        if written is not None:
            values |= measure_likeness(student, signal, written)
        num_rows = weight_of_rows(len(positions.targets), positions.weights) if num_rows is None else num_rows
        of_terms = self.values_of_terms(student, signal, positions, modules)
        for term in self.terms:
            weighted = of_terms[term.name] if positions.weights is None else of_terms[term.name] * positions.weights
            loss = loss + term.weight * weighted.sum() / num_rows
            values[term.name] = of_terms[term.name].detach()
        return loss, values


def make_term(name: str | None = None, **parameters: Any) -> Term:
    """By name and parameters.

    Raises:
        ValueError: no such term, or a parameter that it has not, or that cannot be.
    """
    if not isinstance(name, str) or name not in TERMS:
        raise ValueError(f"losses: there is no term {name!r}, only {', '.join(TERMS)}.")
    options = options_of(TERMS[name])
    if unknown := [option for option in parameters if option not in options]:
        raise ValueError(f"losses: {name} has no {unknown[0]!r}, only {', '.join(options)}.")
    try:
        return TERMS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"losses: {name} does not take these: {parameters}. ({error})") from error


def _union(all_needs: Any) -> Needs:
    """What several terms need together, each layer once."""
    union: dict[str, tuple[int, ...]] = {kind: tuple(layers) for kind, layers in HEAD.items()}
    for needs in all_needs:
        for kind, layers in needs.items():
            union[kind] = tuple(sorted({*union.get(kind, ()), *layers}))
    return union
