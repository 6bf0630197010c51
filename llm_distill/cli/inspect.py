"""`llm-distill inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llm_distill.cli.build import build_capture, load_student
from llm_distill.cli.parsing import errors_in_one_line, parse_capture


def inspect(argv: Sequence[str]) -> None:
    """What a cache holds, whether it is whole and, with a run's options, how true it is: `llm-distill inspect`."""
    parser = argparse.ArgumentParser(
        prog="llm-distill inspect",
        description="Says what a teacher cache holds and verifies every file. With --config (and any option of a "
        "training run) the teacher is loaded, and the fidelity measured anew on that run's texts.",
    )
    parser.add_argument("cache", help="a folder, or a dataset repository on the Hub")
    known, rest = parser.parse_args(argv[:1]), argv[1:]
    with errors_in_one_line():
        from llm_distill.cache import TeacherCache

        cache = TeacherCache.open(known.cache)
        print(cache.summary())
        damaged = cache.verify()
        if damaged:
            raise ValueError(f"{len(damaged)} damaged: {', '.join(damaged)}. `llm-distill capture` makes them again.")
        print(f"All {len(cache.shards)} shards are whole.")
        if rest:
            from torch import nn

            from llm_distill.capture.report import report_fidelity

            script, args, model, _ = parse_capture(rest)  # so that the YAML of either serves
            teacher, data = build_capture(script, args, model)
            if teacher is None:
                raise ValueError("the fidelity is measured beside the teacher: teacher_model_name_or_path is missing.")
            teacher.fit_to(data.tokenizer)
            teacher.prepare(data.accelerator, nn.Module())
            report_fidelity(teacher, load_student(data, model), data, cache)
        elif cache.manifest.get("fidelity"):
            print(cache.manifest["fidelity"]["table"])
