"""Student and teacher sharded over two ranks by FSDP2: the gradients, and the captures, of the unsharded run."""

from __future__ import annotations

from pathlib import Path

import capture_worker
import pytest
import sharded
import torch
from launch import start
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from llm_distill import TeacherCache
from llm_distill.rows import count_rows


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_parameters_give_the_gradient_of_the_unsharded_run(tmp_path: Path, tied: bool) -> None:
    process = start(Path(sharded.__file__), str(tmp_path / "out"), "tied" if tied else "untied", ranks=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-5000:]

    ids, labels = sharded.make_batch()
    student, teacher = sharded.make_models(tied)
    expected = sharded.gradients(student, teacher, ids, labels, 1, count_rows(labels))
    found = load_file(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_capture_of_a_sharded_teacher_writes_the_files_of_one_rank(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of 15 shards: one rank has nothing left in the last round, and must run its share of the layers all the same."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for ranks, options in ((1, "{}"), (2, '{"fsdp2": true}')):
        (tmp_path / str(ranks)).mkdir()
        process = start(Path(capture_worker.__file__), str(tmp_path / str(ranks)), options, ranks=ranks)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-5000:]
    one, two = (TeacherCache(tmp_path / ranks / "cache") for ranks in ("1", "2"))
    assert two.verify() == []
    assert len(two.shards) == 15
    assert {shard.name for shard in two.shards} == {shard.name for shard in one.shards}
