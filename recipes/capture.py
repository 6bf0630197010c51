"""Run the teacher once and store what it says: every option of `llm-distill capture`, on as many ranks as you like.

    accelerate launch recipes/capture.py --config run.yaml --teacher_cache cache

With no student named it runs on the embedded corpus, with the demo's teacher (trained on the first call). Training then
reads the answers: `llm-distill train --config run.yaml --teacher_cache cache`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from demo import use_all_cores
from token_kl import embedded_defaults

from llm_distill.cli.capture import capture

if __name__ == "__main__":
    use_all_cores()
    options = sys.argv[1:]
    named = {option.split("=")[0] for option in options} & {"--config", "--model_name_or_path", "--help", "-h"}
    cache = Path("runs", "capture", "cache")
    capture(options if named else [*embedded_defaults(), "--teacher_cache", str(cache), *options])
