"""What an option is: its default and help, what it needs and may be. One checker serves every configuration."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import yaml

SCIENTIFIC = re.compile(r"[-+]?(\d{1,3}(\.\d*)?|\.\d+)[eE][-+]?\d{1,2}")
"""A number such as 1e-6, which YAML 1.1 takes for text. A longer text may be a commit."""
Needs = str | Mapping[str, Collection[Any]]
"""The name of another option that must be there, or the values that another option must have."""


class Help(str):
    """A help text that carries the rules of its option.

    Parsers of this ecosystem hand all of a field's metadata to argparse, which knows `help` and no rules of ours. The
    rules travel with the text, so that `HfArgumentParser(DistillationConfig)` works as for every other configuration.
    """

    needs: Needs | None
    at_least: float | None
    positive: bool
    parse: Callable[[str, Any], Any] | None


def option(
    default: Any,
    text: str,
    *,
    needs: Needs | None = None,
    at_least: float | None = None,
    positive: bool = False,
    choices: tuple[str, ...] | None = None,
    parse: Callable[[str, Any], Any] | None = None,
) -> Any:
    """A field of a configuration: its help in whole sentences, what it needs, which numbers or words it may be, and how
    it is parsed.
    """
    help_text = Help(text)
    help_text.needs, help_text.at_least, help_text.positive, help_text.parse = needs, at_least, positive, parse
    metadata = {"help": help_text} | ({} if choices is None else {"choices": choices})
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Options:
    """The base of every dataclass of options: they are parsed and checked when it is made.

    Raises:
        ValueError: a value that cannot be, or an option that would have no effect beside the others.
    """

    heading: ClassVar[str]
    """What `--help` shows above them."""

    def __post_init__(self) -> None:
        options = declared_options(self)
        for name, field in options.items():
            if isinstance(default_of(field), list) and isinstance(getattr(self, name), str | int | float):
                setattr(self, name, [getattr(self, name)])  # as a YAML gives one that stands alone
            if parse := field.metadata["help"].parse:
                setattr(self, name, parse(name, getattr(self, name)))
            _require_valid(field, getattr(self, name))
        refused = [f"{name} ({reason})" for name, field in options.items() if (reason := _why_useless(self, field))]
        refused += [message for message, is_conflict in self.conflicts().items() if is_conflict]
        if refused:
            raise ValueError(f"without effect here, so refused: {'; '.join(refused)}.")

    def conflicts(self) -> dict[str, Any]:
        """Whether options contradict each other, by the words that say so."""
        return {}


def declared_options(config: Any) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a configuration, or of its class, that are declared with `option`."""
    return {f.name: f for f in dataclasses.fields(config) if isinstance(f.metadata.get("help"), Help)}


def headings_of(config: type) -> dict[str, str]:
    """The heading of each declared option of a class, which is that of the part that declares it."""
    parts = [part for part in reversed(config.__mro__) if issubclass(part, Options)]
    headings = {name: part.heading for part in parts for name in inspect.get_annotations(part) if part is not Options}
    return {name: headings[name] for name in declared_options(config)}


def fields_chosen(config: Any) -> set[str]:
    """The names of a dataclass's fields that are not at their defaults."""
    return {f.name for f in dataclasses.fields(config) if f.init and getattr(config, f.name) != default_of(f)}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a field that nobody has chosen."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def is_chosen(config: Any, name: str) -> bool:
    """Whether an option is not at its default. An empty mapping is none."""
    return name in fields_chosen(config) and getattr(config, name) != {}


def parse_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping from what Python, a YAML file or a command line gives. None is an empty one.

    Raises:
        ValueError: it is none.
    """
    parsed = parse_text(name, value) or {}
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} must be a mapping such as '{{\"beta\": 0.5}}', got {value!r}.")
    return parsed


def parse_mappings(name: str, value: Any) -> list[dict[str, Any]]:
    """A list of mappings, as `parse_mapping` parses one. Raises ValueError where it is none."""
    parsed = parse_text(name, value) or []
    if not isinstance(parsed, list) or not all(isinstance(part, dict) for part in parsed):
        raise ValueError(f"{name} must be a list of mappings such as '[{{\"weight\": 0.5}}]', got {value!r}.")
    return parsed


def parse_text(name: str, value: Any) -> Any:
    """What a text means, and everything else as it is; numbers are numbers in either. Raises ValueError for a text that
    is not YAML.
    """
    try:
        return with_numbers(read_yaml(value) if isinstance(value, str) else value)
    except ValueError as error:
        raise ValueError(f"{name} must be YAML or JSON, got {value!r}: {error}") from error


def read_yaml(text: str) -> Any:
    """What YAML makes of a text (JSON is YAML).

    Raises:
        ValueError: it is not YAML, or has an alias, with which a few lines become gigabytes.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has an alias (*name), which is not taken: write out what it stands for.")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not YAML. ({error})") from error


def with_numbers(value: Any) -> Any:
    """The same, with a number for each text that is one in YAML 1.2 and in JSON."""
    if isinstance(value, dict):
        return {name: with_numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [with_numbers(part) for part in value]
    return float(value) if isinstance(value, str) and SCIENTIFIC.fullmatch(value) else value


def _require_valid(field: dataclasses.Field[Any], value: Any) -> None:
    rules, choices = field.metadata["help"], field.metadata.get("choices")
    if value is None:
        return
    if choices and value not in choices:
        raise ValueError(f"{field.name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}.")
    numbers = value if isinstance(value, list) else [value]
    if rules.positive and not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"{field.name} must be positive and finite, got {value}.")
    if rules.at_least is not None and not (numbers and all(rules.at_least <= number < math.inf for number in numbers)):
        least = "not be negative" if rules.at_least == 0 else f"be at least {rules.at_least:g}"
        raise ValueError(f"{field.name} must {least}{' each' if isinstance(value, list) else ''}, got {value}.")


def _why_useless(config: Any, field: dataclasses.Field[Any]) -> str | None:
    """Why a chosen option has no effect: what it needs is not there. None where it has one, or is at its default."""
    needs = field.metadata["help"].needs
    if needs is None or not is_chosen(config, field.name):
        return None
    name, values = (needs, None) if isinstance(needs, str) else next(iter(needs.items()))
    value = getattr(config, name)
    if value in values if values is not None else value:
        return None
    if value is None or value == []:
        return f"there {'is' if value is None else 'are'} no {name}"
    if isinstance(value, bool):
        value = "on" if value else "off"
    return f"{name} is {value}"
