"""Which of the teacher's texts a student shall learn from.

A filter sees the completions of one prompt that are still in, and returns as many: a completion as it was, changed, or
None, which leaves it out. It is any callable of that form; FILTERS has ours, by the name that reports and YAML files
use.
"""

from __future__ import annotations

import pkgutil
import re
import runpy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_distill.generation.private_data import PrivateData
from llm_distill.generation.prompts import Content


class Candidate(NamedTuple):
    """A completion that may become a text to learn from, and what belongs to it."""

    prompt: Content
    row: dict[str, Any]
    """The other columns of the prompt's row."""
    text: str
    finished: bool
    tokens: int
    mean_log_prob: float | None
    extra: dict[str, Any] | None = None
    """What the message has besides its text: `reasoning_content`, `tool_calls`."""

    @property
    def tool_calls(self) -> list[Any]:
        return (self.extra or {}).get("tool_calls", [])


Filter = Callable[[Sequence[Candidate]], Sequence[Candidate | None]]


class IndependentFilter(ABC):
    """A filter that judges each completion by itself."""

    @abstractmethod
    def keeps(self, candidate: Candidate) -> bool:
        """Whether it stays in."""

    def __call__(self, candidates: Sequence[Candidate]) -> list[Candidate | None]:
        return [candidate if self.keeps(candidate) else None for candidate in candidates]


@dataclass(frozen=True)
class Finished(IndependentFilter):
    """Those that the teacher ended itself: from one that was cut off a student learns to stop in mid-sentence."""

    def keeps(self, candidate: Candidate) -> bool:
        return candidate.finished


@dataclass(frozen=True)
class Length(IndependentFilter):
    """Those of so many tokens, and of so many characters besides blanks, unless they call a tool."""

    min_tokens: int = 1
    max_tokens: int | None = None
    min_characters: int = 1

    def keeps(self, candidate: Candidate) -> bool:
        return (
            self.min_tokens <= candidate.tokens
            and (self.max_tokens is None or candidate.tokens <= self.max_tokens)
            and (len(candidate.text.strip()) >= self.min_characters or bool(candidate.tool_calls))
        )


def repeated_share(text: str, n: int = 4) -> float:
    """The share of the runs of `n` words (or signs) that have come before."""
    words = re.findall(r"\w+|[^\w\s]", text)
    runs = list(zip(*(words[start:] for start in range(n)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@dataclass(frozen=True)
class Repetition(IndependentFilter):
    """Those in which at most `max_share` of the runs of `n` words (or signs) have come before."""

    max_share: float = 0.5
    n: int = 4

    def keeps(self, candidate: Candidate) -> bool:
        return repeated_share(candidate.text, self.n) <= self.max_share


@dataclass(frozen=True)
class LogProb(IndependentFilter):
    """Those that the teacher finds likely enough: mean log-probability in nats a token, at temperature 1."""

    min: float = -3.0

    def keeps(self, candidate: Candidate) -> bool:
        if candidate.mean_log_prob is None:
            raise ValueError(
                "the filter log_prob needs the teacher's log-probabilities, and these texts came without them: they "
                "were written by another run or by a server that tells none."
            )
        return candidate.mean_log_prob >= self.min


@dataclass
class Verifier(IndependentFilter):
    """Those that `check(prompt, completion, row)` finds right: `package.module:function` or `file.py:function`."""

    check: str | Callable[[Content, str, dict[str, Any]], bool]

    def __post_init__(self) -> None:
        self._check = self.check if callable(self.check) else find_function(self.check)

    def keeps(self, candidate: Candidate) -> bool:
        return bool(self._check(candidate.prompt, candidate.text, candidate.row))


@dataclass
class ExactDuplicates:
    """The first of the same text after the same prompt."""

    _seen: set[tuple[str, str]] = field(default_factory=set, init=False, repr=False)

    def __call__(self, candidates: Sequence[Candidate]) -> list[Candidate | None]:
        new: list[Candidate | None] = []
        for candidate in candidates:
            key = (str(candidate.prompt), candidate.text.strip() + str(candidate.tool_calls or ""))
            new.append(None if key in self._seen else candidate)
            self._seen.add(key)
        return new


@dataclass
class NearDuplicates:
    """The first of texts that share `threshold` of their runs of three words, whatever the prompt (MinHash, LSH).

    Texts under `min_words` are left in: many questions have the same short answer.
    """

    threshold: float = 0.8
    min_words: int = 10
    _sketches: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"near_duplicates: threshold must be in (0, 1), got {self.threshold}.")
        from datasketch import MinHashLSH

        self._index = MinHashLSH(threshold=self.threshold, num_perm=128)

    def __call__(self, candidates: Sequence[Candidate]) -> list[Candidate | None]:
        return [candidate if self._is_new(candidate.text) else None for candidate in candidates]

    def _is_new(self, text: str) -> bool:
        from datasketch import MinHash

        words = re.findall(r"\w+", text.lower())
        if len(words) < self.min_words:
            return True
        sketch = MinHash(num_perm=128)
        sketch.update_batch([" ".join(run).encode() for run in {*zip(words, words[1:], words[2:], strict=False)}])
        if any(sketch.jaccard(self._sketches[place]) >= self.threshold for place in self._index.query(sketch)):
            return False
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return True


@dataclass(frozen=True)
class Majority:
    """Those whose answer most of a prompt's completions give (self-consistency, arXiv:2203.11171).

    The answer is what the last match of `answer` (a regular expression; its first group, if it has one) finds. Prompts
    whose commonest answer has less than `min_share` lose all.
    """

    answer: str = r"(?s).*"
    min_share: float = 0.5

    def __post_init__(self) -> None:
        re.compile(self.answer)
        if not 0 < self.min_share <= 1:
            raise ValueError(f"majority: min_share is a share of 1, got {self.min_share}.")

    def __call__(self, candidates: Sequence[Candidate]) -> list[Candidate | None]:
        answers = [self._answer(candidate.text) for candidate in candidates]
        counts = Counter(answer for answer in answers if answer is not None)
        commonest = max(counts, key=counts.__getitem__, default=None)
        if commonest is None or counts[commonest] < self.min_share * len(candidates):
            return [None] * len(candidates)
        return [
            candidate if answer == commonest else None for candidate, answer in zip(candidates, answers, strict=True)
        ]

    def _answer(self, text: str) -> str | None:
        matches = [match for match in re.finditer(self.answer, text) if match[0]]
        return matches[-1][1 if matches[-1].re.groups else 0].strip() if matches else None


@dataclass
class Private(IndependentFilter):
    """Texts without e-mail addresses, telephone numbers, IBANs, card numbers and keys: `drop` them, or `mask` what is
    found. What is in the prompt stays: it is the user's.

    Telephone numbers without a country code are those of `region` (such as US), if one is given.
    """

    action: str = "drop"
    region: str | None = None

    def __post_init__(self) -> None:
        if self.action not in ("drop", "mask"):
            raise ValueError(f"private_data: action must be drop or mask, got {self.action!r}.")
        self._private_data = PrivateData(self.region)

    def keeps(self, candidate: Candidate) -> bool:
        return self._mask(candidate) == candidate

    def __call__(self, candidates: Sequence[Candidate]) -> list[Candidate | None]:
        if self.action == "drop":
            return super().__call__(candidates)
        return [self._mask(candidate) for candidate in candidates]

    def _mask(self, candidate: Candidate) -> Candidate:
        return candidate._replace(text=self._masked(candidate.text), extra=self._masked(candidate.extra))

    def _masked(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._masked(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._masked(item) for item in value]
        return self._private_data.mask(value) if isinstance(value, str) else value


FILTERS: dict[str, Callable[..., Filter]] = {
    "finished": Finished,
    "length": Length,
    "repetition": Repetition,
    "log_prob": LogProb,
    "verifier": Verifier,
    "private_data": Private,
    "majority": Majority,
    "exact_duplicates": ExactDuplicates,
    "near_duplicates": NearDuplicates,
}
DEFAULTS: dict[str, dict[str, Any]] = {"finished": {}, "length": {}, "exact_duplicates": {}}


def make_filters(chosen: dict[str, dict[str, Any] | None]) -> dict[str, Filter]:
    """From `{name: parameters}`, in that order.

    Raises:
        ValueError: no such filter, parameters that it has not, or a library that is not installed.
    """
    made: dict[str, Filter] = {}
    for name, parameters in chosen.items():
        if name not in FILTERS:
            raise ValueError(f"unknown filter {name!r}. There are {', '.join(FILTERS)}.")
        try:
            made[name] = FILTERS[name](**(parameters or {}))
        except TypeError as error:
            raise ValueError(f"the filter {name} does not take {parameters}. ({error})") from error
        except ImportError as error:
            raise ValueError(f"the filter {name} needs {error.name}: pip install 'llm-distill[generation]'.") from error
    return made


def find_function(name: str) -> Callable[..., Any]:
    """`package.module:function`, or `path/to/file.py:function`, which is run.

    Raises:
        ValueError: there is none of this name.
    """
    place, _, function = name.rpartition(":")
    try:
        return runpy.run_path(place)[function] if place.endswith(".py") else pkgutil.resolve_name(name)
    except (ImportError, OSError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(
            f"no function {name!r}: expected package.module:function or path/to/file.py:function. ({error})"
        ) from error
