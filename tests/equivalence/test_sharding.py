"""Student and teacher sharded over two ranks by FSDP2: the gradients, and the captures, of the unsharded run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharded
import sharded_writing
import torch
from accelerate.utils import DistributedType
from launch import run_ranks
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from llm_distill.generation.writers.vllm import merged_weights
from llm_distill.rows import count_rows
from llm_distill.students.modules import modules_set_aside


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_parameters_give_the_gradient_of_the_unsharded_run(tmp_path: Path, tied: bool) -> None:
    run_ranks(Path(sharded.__file__), str(tmp_path / "out"), "tied" if tied else "untied", ranks=2)

    ids, labels = sharded.make_batch()
    student, teacher = sharded.make_models(tied)
    expected = sharded.gradients(student, teacher, ids, labels, 1, count_rows(labels))
    found = load_file(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_sharded_student_writes_what_the_whole_one_writes_and_learns_as_it_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    """One rank has three texts to write, of unequal prompts, and the other none."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run_ranks(Path(sharded_writing.__file__), str(tmp_path), kind, ranks=2)

    student, teacher = sharded_writing.make_pair(kind)
    texts, empty = (json.loads((tmp_path / f"texts-{rank}.json").read_text()) for rank in range(2))
    prompts = sharded_writing.PROMPTS[0]
    whole = {"distributed_type": DistributedType.NO, "process_index": 0}
    one_process = SimpleNamespace(**vars(sharded.fsdp2()) | whole)
    policy = sharded_writing.make_policy(student, tokenizer, one_process, tmp_path)
    assert texts == sharded_writing.write_texts(policy, prompts)
    assert len(texts) == len(prompts)
    assert empty == []
    with modules_set_aside(student):
        weights = dict(merged_weights(student))
    for rank in range(2):
        given = load_file(tmp_path / f"weights-{rank}")
        assert given.keys() == weights.keys()
        assert all(torch.equal(given[name], weight) for name, weight in weights.items())
    ids, labels = sharded.make_batch()
    expected = sharded.gradients(student, teacher, ids, labels, 1, count_rows(labels))
    found = load_file(tmp_path / "gradients")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_capture_of_a_sharded_teacher_writes_the_files_of_one_rank(captured_shards: Callable[..., set[str]]) -> None:
    """Of 15 shards: one rank has nothing left in the last round, and must run its share of the layers all the same."""
    one, two = captured_shards(1), captured_shards(2, fsdp2=True)
    assert len(two) == 15
    assert two == one
