"""A real vLLM writes as the student in training, on the CPU: colocated, or as a server."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from launch_vllm import VLLM
from servers import RunningServer
from tiny import tiny_llama
from train_with_vllm import STEPS
from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).parents[2]
ROUNDING = 0.08
"""Nats that a log-probability may be off where vLLM has a tiny model's logits in bfloat16; others are off by nats."""


@pytest.fixture(scope="module")
def facts(served_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `train_with_vllm.py` saw in three steps of a student with adapters and a head that is trained whole."""
    folder = tmp_path_factory.mktemp("vllm_writer")
    tiny_llama(3).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    script = Path(__file__).with_name("train_with_vllm.py")
    return in_vllms_environment(script, served_model, folder / "teacher", folder / "facts.json")


def in_vllms_environment(script: Path, *arguments: str | Path) -> Any:
    """The JSON that a script has written into the file that is its last argument."""
    ours = [str(ROOT), sysconfig.get_paths()["purelib"], str(ROOT / "tests" / "support")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(ours),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TRITON_INTERPRET": "0",
        "TORCH_COMPILE_DISABLE": "1",
    }
    command = [VLLM.with_name("python"), script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(arguments[-1]).read_text())


@pytest.mark.parametrize("when", ["before", "after"])
def test_vllm_and_transformers_agree_on_the_students_log_probabilities(facts: Any, when: str) -> None:
    seen = facts[when]
    pairs = zip(seen["log_probs"], seen["transformers' log_probs"], strict=True)
    errors = [abs(one - other) for texts in pairs for one, other in zip(*texts, strict=True)]
    assert max(errors) < ROUNDING
    assert sum(errors) / len(errors) < ROUNDING / 4


def test_what_vllm_writes_is_by_the_student_as_it_has_become(facts: Any) -> None:
    for when in ("before", "after"):
        assert common(facts[when]["texts"], facts[when]["transformers"]) >= 6, (
            "of two tokens as likely rounding decides"
        )
    assert common(facts["before"]["texts"], facts["after"]["texts"]) <= 2


def common(texts: list[list[int]], others: list[list[int]]) -> int:
    """How many of eight texts begin as the others do."""
    return sum(one[:2] == other[:2] for one, other in zip(texts, others, strict=True))


def test_completions_come_in_the_order_of_their_prompts(facts: Any) -> None:
    assert facts["before"]["one at a time"] == facts["before"]["texts"]


def test_weights_are_sent_when_they_have_changed_and_not_otherwise(facts: Any) -> None:
    assert facts["sent for three generations of one student"] == 1
    assert facts["sent in training"] == STEPS - 1, "the first step's had been sent"
    assert facts["frozen weights as they were"]


def test_what_is_sampled_depends_on_the_seed_and_each_text_is_drawn_apart(facts: Any) -> None:
    for name in ("same seed, same texts", "other seed, other texts", "a prompt twice, two texts"):
        assert facts[name], name
    assert facts["random numbers untouched"]


def test_an_end_token_of_the_teacher_ends_a_text(facts: Any) -> None:
    assert facts["ended by a token of the teacher's"] == [True, True]


def test_the_run_learns_from_what_was_written(facts: Any) -> None:
    assert len(facts["losses"]) == STEPS
    assert 0 < facts["losses"][-1] < facts["losses"][0]
    assert all(0 < length <= 12 for length in facts["lengths"])


def test_a_server_writes_what_the_student_writes_in_the_order_of_its_prompts(
    served_model: Path, vllm_server: RunningServer, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("write_behind_vllm.py")
    facts = in_vllms_environment(script, served_model, vllm_server.url, tmp_path / "facts.json")
    assert facts["texts"] == facts["transformers"]
    assert facts["sent"] == [1, 2], "once for two generations of one student, and when it has changed"
    assert facts["ended"] == [facts["texts"][0][:2], True]
