"""Starts a vLLM from the environment that `make test-served` builds."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from servers import RunningServer, serving

VLLM = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "vllm"
START_SECONDS = 240


def serving_vllm(model: Path, log: Path, *options: str) -> AbstractContextManager[RunningServer]:
    """Serves `model` under the name `teacher` on a CPU."""
    assert VLLM.exists(), "there is no vLLM: `make test-served` builds it."
    where = ["--host", "127.0.0.1", "--port", "PORT", "--served-model-name", "teacher"]
    how = ["--max-model-len", "256", "--dtype", "float32", "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": ""}
    command = [VLLM, "serve", model, *where, *how, *options]
    return serving(command, log, environment=environment, seconds=START_SECONDS)
