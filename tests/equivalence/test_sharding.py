"""Student and teacher sharded over two ranks by FSDP2: the gradients, and the captures, of the unsharded run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sharded
import torch
from launch import run_ranks
from safetensors.torch import load_file

from llm_distill.rows import count_rows


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


def test_a_capture_of_a_sharded_teacher_writes_the_files_of_one_rank(captured_shards: Callable[..., set[str]]) -> None:
    """Of 15 shards: one rank has nothing left in the last round, and must run its share of the layers all the same."""
    one, two = captured_shards(1), captured_shards(2, fsdp2=True)
    assert len(two) == 15
    assert two == one
