"""Generated texts on the Hub: what was kept, who wrote it, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import PERSON, REPO, REVISION, TEACHER, TOKEN, Hub, python
from huggingface_hub import DatasetCard

from llm_distill.generation import Prompt, Sampling, TransformersEngine, generate, make_filters, prompts_of
from llm_distill.models import LanguageModel

SAMPLING = Sampling(num_completions=2, max_new_tokens=4)
PUSH = """
import sys
from llm_distill.publish.datasets import push_generated

home, repo = sys.argv[1:]
try:
    print(push_generated(home + "/run", repo, filters={"length": {}, "verifier": {"check": home + "/mine.py:f"}}))
except (ValueError, ConnectionError) as error:
    print(f"{type(error).__name__}: {' '.join(str(error).split())}")
"""


@pytest.fixture
def run(home: Path, saved: Path) -> Path:
    """A folder of texts by a teacher of the Hub, of which some are rejected."""
    teacher = LanguageModel.load(str(saved / "teacher"))
    teacher._description |= {"model": TEACHER, "revision": REVISION}
    prompts: list[Prompt] = list(prompts_of({"prompt": f"x = {n}", "secret": f"row {n}"} for n in range(6)))
    filters: Any = make_filters({"length": {}, "majority": {"min_share": 1.0}})
    generate(TransformersEngine(teacher, SAMPLING), prompts, home / "run", filters=filters)
    return home / "run"


def test_what_was_kept_is_pushed_with_a_card(hub: Hub, home: Path, run: Path) -> None:
    url = f"{hub.url}/datasets/{REPO}"
    assert python(hub, home, PUSH + PUSH.split("sys.argv[1:]")[1]) == [url, url]
    names = {".gitattributes", "README.md", "generation.json", "report.json", "train.parquet"}
    assert hub.files[REPO].keys() == names, "neither rejected texts nor journals"
    for name, content in hub.files[REPO].items():
        for private in (TOKEN, PERSON, str(home.parent)):
            assert private.encode() not in content, f"{private} in {name}"
    card = DatasetCard(hub.files[REPO]["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == [TEACHER]
    assert "| filters | length, verifier |" in card.text
    assert "| rejected: majority |" in card.text
    assert json.loads(hub.files[REPO]["report.json"])["prompts"] == 6


def test_other_peoples_repositories_are_left_alone(hub: Hub, home: Path, run: Path) -> None:
    hub.files[REPO] = {".gitattributes": b"", "model.safetensors": b"weights"}
    (printed,) = python(hub, home, PUSH)
    assert "has other things in it, such as model.safetensors" in printed
    settings = json.loads((run / "generation.json").read_text())
    settings["sampling"]["seed"] = 7
    hub.files[REPO] = {".gitattributes": b"", "generation.json": json.dumps(settings).encode()}
    (printed,) = python(hub, home, PUSH)
    assert "holds another set of generated texts: sampling.seed: the repository has 7, asked for is 0" in printed
    assert not hub.commits


def test_a_missing_right_is_said(hub: Hub, home: Path, run: Path) -> None:
    (printed,) = python(hub, home, PUSH.replace('home + "/run", repo', 'home + "/run", "others/texts"'))
    assert printed.startswith("ValueError: the Hub does not let you write to others/texts")
