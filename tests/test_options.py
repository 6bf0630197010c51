"""Options: what they need, what they may be, and how Python, YAML and a command line give them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser
from trl import TrlParser

from llm_distill import DistillationConfig
from llm_distill.options import Options, fields_chosen, headings_of, option, parse_mapping, parse_mappings
from llm_distill.students.options import PruneConfig


@dataclass
class Oven(Options):
    heading = "the oven"

    degrees: int | None = option(None, "It is as hot as this.", at_least=20)
    fan: bool = option(False, "Its fan runs.", needs="degrees")
    fan_speed: float = option(1.0, "It runs this fast.", needs="fan", positive=True)
    program: str = option("bread", "It bakes this.", choices=("bread", "cake"))
    sugar: dict[str, Any] | str | None = option(
        None, "It has this much of each sugar.", needs={"program": ("cake",)}, parse=parse_mapping
    )
    layers: list[dict[str, Any]] | str | None = option(None, "These lie on each other.", parse=parse_mappings)
    trays: list[int] = option([1, 2], "These trays are used.", at_least=1)
    guests: list[str] = option([], "It is for these guests.")
    plates: int = option(0, "Each has so many plates.", needs="guests")


@dataclass
class Kitchen(Oven):
    """Inherits an oven, and has conflicts of its own."""

    heading = "the kitchen"

    window: bool = option(True, "Its window is open.")

    def conflicts(self) -> dict[str, Any]:
        return super().conflicts() | {"window (the oven is hot)": not self.window and self.degrees}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fan": True}, "without effect here, so refused: fan (there is no degrees)."),
        ({"degrees": 180, "fan_speed": 2.0}, "fan_speed (fan is off)"),
        ({"sugar": {"brown": 1}}, "sugar (program is bread)"),
        ({"plates": 2}, "plates (there are no guests)"),
        ({"degrees": 180, "window": False}, "window (the oven is hot)"),
        ({"fan": True, "plates": 1}, "fan (there is no degrees); plates (there are no guests)."),
        ({"degrees": 19}, "degrees must be at least 20, got 19."),
        ({"degrees": float("nan")}, "degrees must be at least 20, got nan."),
        ({"degrees": 20, "fan": True, "fan_speed": 0.0}, "fan_speed must be positive and finite, got 0.0."),
        ({"degrees": 20, "fan": True, "fan_speed": float("inf")}, "fan_speed must be positive and finite, got inf."),
        ({"trays": [1, 0]}, "trays must be at least 1 each, got [1, 0]."),
        ({"trays": []}, "trays must be at least 1 each, got []."),
        ({"program": "pie"}, "program must be bread or cake, got 'pie'."),
        ({"sugar": "[1]"}, "sugar must be a mapping such as"),
        ({"sugar": "{brown: "}, "got '{brown: '"),
        ({"layers": {"name": "cream"}}, "layers must be a list of mappings such as"),
        ({"layers": "[cream]"}, "got '[cream]'"),
    ],
    ids=str,
)
def test_what_cannot_be_and_what_has_no_effect_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Kitchen(**options)


def test_an_option_at_its_default_needs_nothing() -> None:
    assert fields_chosen(Kitchen()) == {"sugar", "layers"}, "None is parsed to an empty mapping and an empty list"
    assert Kitchen(fan=False, fan_speed=1.0, sugar={}, trays=[1, 2]).trays == [1, 2]
    assert Kitchen().trays is not Kitchen().trays
    assert Kitchen(degrees=20, fan=True, fan_speed=2.0, program="cake", sugar={"brown": 1}).fan_speed == 2.0


LAYERS = [{"name": "cream", "weight": 1e-6}, {"name": "base", "sizes": [1.0, 20.0]}]


@pytest.mark.parametrize(
    "given",
    [
        LAYERS,
        '[{"name": "cream", "weight": 1e-6}, {"name": "base", "sizes": [1.0, 2e1]}]',
        "- {name: cream, weight: 1e-6}\n- name: base\n  sizes: [1.0, 2e+1]",
    ],
    ids=["Python", "JSON", "YAML"],
)
def test_a_list_of_mappings_is_read_from_everywhere(tmp_path: Path, given: Any) -> None:
    assert Kitchen(layers=given).layers == LAYERS
    text = given if isinstance(given, str) else yaml.safe_dump(given)
    (parsed,) = TrlParser(Kitchen).parse_args_and_config(["--layers", text])
    assert parsed.layers == LAYERS
    in_file = yaml.safe_load(text) if isinstance(given, str) else given
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"layers": in_file, "program": "cake", "sugar": {"brown": "1e-3"}})
    )
    parsed, *_ = TrlParser(Kitchen).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
    assert (parsed.layers, parsed.sugar) == (LAYERS, {"brown": 1e-3})


def test_a_text_that_only_looks_like_a_number_stays_a_text() -> None:
    texts = {"revision": "12e4567", "name": "e5", "version": "1.10", "dtype": "auto", "long": "1e1000"}
    assert parse_mapping("kwargs", texts) == texts
    numbers = {"a": "1e-6", "b": "2.5E3", "c": "-.5e2", "d": 3, "e": {"f": ["1e2"]}}
    assert parse_mapping("kwargs", numbers) == {"a": 1e-6, "b": 2500.0, "c": -50.0, "d": 3, "e": {"f": [100.0]}}


def test_each_option_stands_under_the_heading_of_the_part_that_declares_it() -> None:
    headings = headings_of(Kitchen)
    assert (headings["degrees"], headings["window"]) == ("the oven", "the kitchen")
    headings = headings_of(DistillationConfig)
    assert (headings["teacher_cache"], headings["divergence"], headings["bf16"]) == (
        "the teacher",
        "the objective",
        "the run",
    )
    assert "learning_rate" not in headings


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_other_parsers_take_our_options_as_any_others(parser: type[HfArgumentParser], tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--divergence", "jsd", "--divergence_kwargs", '{"beta": 1e-1}']
    (config,) = parser(DistillationConfig).parse_args_into_dataclasses([*flags, "--on_miss", "error"])
    assert (config.divergence, config.divergence_kwargs, config.on_miss) == ("jsd", {"beta": 0.1}, "error")


def test_a_value_alone_in_a_yaml_is_a_list_of_one() -> None:
    config = PruneConfig(model="model", output_dir="cut", layers=20)  # type: ignore[arg-type]
    assert config.layers == [20]
