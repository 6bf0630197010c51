"""What real servers write is what the model writes in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
from launch_vllm import VLLM
from proxy import FaultyProxy
from servers import RunningServer

from llm_distill.generation import Prompt, Sampling, TransformersEngine, generate, prompts_of
from llm_distill.generation.engines.base import Answer
from llm_distill.generation.engines.endpoint import EndpointEngine
from llm_distill.models import LanguageModel

GREEDY = Sampling(max_new_tokens=6, temperature=0)
TEXTS = ["import os", "def f(x):", "class A(B):\n    def", "for line in file:", "return self.name", "x = [1, 2"]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return list(prompts_of({"prompt": text} for text in TEXTS))


@pytest.fixture(scope="module")
def live(served_model: Path, prompts: list[Prompt]) -> dict[str, Answer]:
    engine = TransformersEngine(LanguageModel.load(str(served_model)), GREEDY, score=True)
    return {answer.prompt.content: answer for answer in engine.write(prompts)}


def test_transformers_serve_writes_the_same(
    transformers_server: RunningServer, served_model: Path, prompts: list[Prompt], live: dict[str, Answer]
) -> None:
    engine = EndpointEngine(f"{transformers_server.url}/v1", str(served_model), GREEDY, concurrency=2)
    assert "/" not in engine.describe()["model"]
    for answer in engine.write(prompts):
        (written,), (expected,) = answer.completions, live[answer.prompt.content].completions
        assert written.text.replace("\ufffd", "") == expected.text.replace("\ufffd", "")


def test_vllm_behind_its_server_writes_the_same(
    vllm_server: RunningServer, prompts: list[Prompt], live: dict[str, Answer], tmp_path: Path
) -> None:
    """With everything going wrong in between that goes wrong in a day."""
    faults = ["slow", "reset", "429", "500", "truncated", "not_json", None, "reset", "500"]
    with FaultyProxy(vllm_server.url, faults, slow_seconds=0.5, retry_after=0.2) as proxy:
        served = "teacher"
        engine = EndpointEngine(f"{proxy.url}/v1", served, GREEDY, concurrency=3, log_probs=True)
        report = generate(engine, prompts, tmp_path / "run")
        assert report.complete
        assert proxy.met.total() == len(faults) - 1
    for answer in EndpointEngine(f"{vllm_server.url}/v1", served, GREEDY, log_probs=True).write(prompts):
        (written,), (expected,) = answer.completions, live[answer.prompt.content].completions
        assert written.text.replace("\ufffd", "") == expected.text.replace("\ufffd", "")
        assert written.mean_log_prob == pytest.approx(expected.mean_log_prob, abs=1e-3)


def test_vllm_offline_writes_the_same(served_model: Path, live: dict[str, Answer], tmp_path: Path) -> None:
    asked, answered = tmp_path / "asked.json", tmp_path / "answered.json"
    asked.write_text(json.dumps([*TEXTS, "abc " * 200]))
    ours = [str(Path(__file__).parents[2]), sysconfig.get_paths()["purelib"]]  # this package, and what it needs
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(ours),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TRITON_INTERPRET": "0",
    }
    command = [VLLM.with_name("python"), Path(__file__).with_name("write_with_vllm.py"), served_model, asked, answered]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(answered.read_text())
    assert "longer than the teacher's context of 128" in answers.pop("abc " * 200)
    for text, ((ids, written, mean_log_prob),) in answers.items():
        (expected,) = live[text].completions
        assert (ids, written) == (expected.ids, expected.text)
        assert mean_log_prob == pytest.approx(expected.mean_log_prob, abs=1e-3)
    assert set(answers) == set(TEXTS)
