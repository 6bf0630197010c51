"""Fixtures of the tests of the fused head loss."""

from __future__ import annotations

import pytest
from head_cases import VOCAB

from llm_distill.losses.fused import cpp_backend, head_loss, torch_backend
from llm_distill.losses.fused.task import Backend, HeadLossTask


@pytest.fixture
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "chunk_rows", lambda *_: 16)  # 37 rows in chunks of 16, 16 and 5
    monkeypatch.setattr(torch_backend, "BLOCK_ELEMENTS", {"cpu": 5 * VOCAB})  # and those in blocks of 5


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test in one back end; the compiled one must be there, and not be left for the other unawares."""

    def choose(task: HeadLossTask) -> Backend:
        if request.param == "compiled" and len(task.teachers) <= 1:
            kernels = cpp_backend.kernels_of(task)
            assert kernels, "no kernels: is g++ installed?"
            return kernels
        return torch_backend

    monkeypatch.setattr(head_loss, "choose_backend", choose)
    return request.param
