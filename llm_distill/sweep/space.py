"""What a sweep may try: choices and ranges of options, alone or several together."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

ONE_OF = "one_of"
"""The name under which a search lists options that are set together."""
RANGE_KEYS = {"low", "high", "log", "step"}
SHAPES = "a list of choices such as [1, 2, 4], or a range such as {low: 1e-5, high: 1e-3, log: true}"

Setting = dict[str, Any]
"""A value for each option that is searched. A dot stands for a name within an option: `divergence_kwargs.beta`."""


class Draw(Protocol):
    """Who says what is tried: a trial of optuna, or `RandomDraw`."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...


@dataclass(frozen=True)
class Choices:
    """Some values. What optuna cannot hold, as a mapping, it has as JSON."""

    values: tuple[Any, ...]

    def suggest(self, draw: Draw, name: str) -> Any:
        texts = [value if isinstance(value, str | int | float | bool) else json.dumps(value) for value in self.values]
        return self.values[texts.index(draw.suggest_categorical(name, texts))]

    def count(self) -> float:
        return len(self.values)

    def examples(self) -> list[Any]:
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """All numbers between two, at equal steps if there is a step; `log`: as often between 1 and 10 as between 10 and
    100. Whole numbers where both ends and the step are.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def suggest(self, draw: Draw, name: str) -> float:
        if isinstance(self.step, int) and isinstance(self.low, int) and isinstance(self.high, int):
            return draw.suggest_int(name, self.low, self.high, step=self.step, log=self.log)
        return draw.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def count(self) -> float:
        return math.inf if self.step is None else math.floor((self.high - self.low) / self.step + 1e-9) + 1

    def examples(self) -> list[Any]:
        return [self.low, self.high]


@dataclass(frozen=True)
class Space:
    """Each option with what it may be, and groups of which one is taken."""

    parts: Mapping[str, Choices | Range]
    groups: Mapping[str, Space]
    """By what is fixed in each, as `divergence=jsd`."""

    @classmethod
    def of(cls, search: Any, whole: frozenset[str] = frozenset()) -> Space:
        """A space from what a YAML file holds.

        Args:
            search: the content.
            whole: the options that are whole numbers.

        Raises:
            ValueError: what is no space, or has nothing to search.
        """
        if not isinstance(search, dict) or not search:
            raise ValueError(f"the search must have lines such as `loss_temperature: [1, 2, 4]`, got {search!r}.")
        parts = {str(name): _part(str(name), value, whole) for name, value in search.items() if name != ONE_OF}
        groups: dict[str, Space] = {}
        for content in search.get(ONE_OF, ()):
            if not isinstance(content, dict) or ONE_OF in content:
                raise ValueError(f"{ONE_OF} must be a list of mappings of options, got {content!r}.")
            if twice := sorted(set(content) & set(parts)):
                raise ValueError(f"{twice[0]} is searched twice: alone, and in {ONE_OF}.")
            fixed = {name: value for name, value in content.items() if not _is_searched(value)}
            label = ", ".join(f"{name}={value}" for name, value in fixed.items()) or f"number {len(groups) + 1}"
            if label in groups:
                raise ValueError(f"two groups of {ONE_OF} are {label}: write what differs as a list in one of them.")
            group = {name: Choices((value,)) for name, value in fixed.items()}
            searched = {name: _part(name, value, whole) for name, value in content.items() if name not in fixed}
            groups[label] = cls(group | searched, {})
        if ONE_OF in search and len(groups) < 2:
            raise ValueError(f"{ONE_OF} must list two groups of options at least.")
        return cls(parts, groups)

    def names(self) -> list[str]:
        """Every option that is searched, as it is written."""
        return list(dict.fromkeys([*self.parts, *(name for group in self.groups.values() for name in group.names())]))

    def count(self) -> float:
        """How many settings there are; infinite with a range without steps."""
        alone = math.prod(part.count() for part in self.parts.values())
        return alone * (sum(group.count() for group in self.groups.values()) if self.groups else 1)

    def suggest(self, draw: Draw) -> Setting:
        """A setting. What is searched in a group has the group's label in its name, since it is another question."""
        setting = {name: part.suggest(draw, name) for name, part in self.parts.items()}
        if self.groups:
            label = draw.suggest_categorical(ONE_OF, list(self.groups))
            for name, part in self.groups[label].parts.items():
                is_fixed = part.count() == 1
                setting[name] = part.examples()[0] if is_fixed else part.suggest(draw, f"{name} [{label}]")
        return setting

    def examples(self, limit: int) -> Iterator[Setting]:
        """All settings of choices and ends of ranges, or `limit` of them, in which each value is."""
        for group in self.groups.values() or [Space({}, {})]:
            parts = {name: part.examples() for name, part in {**self.parts, **group.parts}.items()}
            count, most = math.prod(map(len, parts.values())), max(1, limit // max(1, len(self.groups)))
            if count <= most:
                yield from (dict(zip(parts, values, strict=True)) for values in itertools.product(*parts.values()))
                continue
            generator = random.Random(0)
            columns = [itertools.cycle(generator.sample(values, len(values))) for values in parts.values()]
            for _ in range(max(most, *map(len, parts.values()))):
                values = [next(column) for column in columns]
                yield dict(zip(parts, values, strict=True))


class RandomDraw:
    """Draws by chance, and remembers what it drew as optuna would."""

    def __init__(self, generator: random.Random) -> None:
        self.generator, self.params = generator, dict[str, Any]()

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.params[name] = self.generator.choice(list(choices))
        return self.params[name]

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        if log:
            value = math.exp(self.generator.uniform(math.log(low), math.log(high)))
        else:
            value = self.generator.uniform(low, high) if step is None else low + step * self._step(low, high, step)
        self.params[name] = min(max(value, low), high)
        return self.params[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        self.params[name] = low + step * self._step(low, high, step)
        return self.params[name]

    def _step(self, low: float, high: float, step: float) -> int:
        return self.generator.randint(0, math.floor((high - low) / step + 1e-9))


def with_setting(options: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """The options that a setting changes, whole: a name with a dot changes a part of the option before it.

    `losses.hidden` is the weight of the term of that name, which is left out at 0, and `losses.hidden.layers` another
    of its keys.
    """
    changed: dict[str, Any] = {}
    for name, value in setting.items():
        option, *path = name.split(".")
        if not path:
            changed[option] = value
            continue
        before = changed.get(option, options.get(option))
        if option == "losses":
            changed[option] = _with_term(before or [], path[0], path[1] if path[1:] else "weight", value)
        else:
            changed[option] = {**(before or {}), ".".join(path): value}
    return changed


def _with_term(terms: list[dict[str, Any]], name: str, key: str, value: Any) -> list[dict[str, Any]]:
    old = next((term for term in terms if term["name"] == name), {"name": name})
    others = [term for term in terms if term["name"] != name]
    return others if key == "weight" and value == 0 else [*others, old | {key: value}]


def _is_searched(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and {"low", "high"} <= set(value))


def _part(name: str, value: Any, whole: frozenset[str]) -> Choices | Range:
    if isinstance(value, list):
        if len(value) < 2 or None in value or len({json.dumps(choice) for choice in value}) < len(value):
            raise ValueError(f"{name}: {value!r} must have two different values at least, and none may be empty.")
        return Choices(tuple(value))
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {value!r} searches nothing: give {SHAPES}, or write it into the run's YAML.")
    if not {"low", "high"} <= set(value) <= RANGE_KEYS:
        raise ValueError(f"{name}: expected {SHAPES}, got {value!r}.")
    low, high, log, step = value["low"], value["high"], value.get("log", False), value.get("step")
    numbers = [low, high, *([] if step is None else [step])]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        raise ValueError(f"{name}: low, high and step must be numbers, got {value!r}.")
    if low >= high or (log and (low <= 0 or step is not None)) or (step is not None and step <= 0):
        raise ValueError(
            f"{name}: low must be below high, step positive, and with log low positive and no step, got {value!r}."
        )
    if name in whole and isinstance(low, int) and isinstance(high, int):
        return Range(low, high, log, step or 1)
    return Range(low, high, bool(log), step)
