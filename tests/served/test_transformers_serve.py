"""The text endpoint of `transformers serve`."""

from __future__ import annotations

from pathlib import Path

import urllib3
from servers import RunningServer


def test_it_completes_a_text(transformers_server: RunningServer, served_model: Path) -> None:
    body = {"model": str(served_model), "prompt": "import os", "max_tokens": 5}
    answer = urllib3.request("POST", f"{transformers_server.url}/v1/completions", json=body)
    assert answer.status == 200
    assert answer.json()["usage"]["completion_tokens"] == 5
