"""`llm-distill inspect`."""

from __future__ import annotations

from collections.abc import Sequence

from llm_distill.cli.build import build_capture, load_student
from llm_distill.cli.parsing import Parser, errors_in_one_line, parse
from llm_distill.tables import printable

DESCRIPTION = """Says what a teacher cache holds and verifies every file. With --config (and any option of a training
run) the teacher is loaded, and the fidelity is measured anew on that run's texts."""
EXAMPLE = "llm-distill inspect teacher_cache --config run.yaml"


@errors_in_one_line
def inspect(argv: Sequence[str]) -> None:
    """What a cache holds, whether it is whole and, with a run's options, how true it is: `llm-distill inspect`."""
    parser = Parser("inspect", DESCRIPTION, EXAMPLE)
    parser.add_argument("cache", help="The cache is this folder, or this dataset repository on the Hub.")
    options = parser.parse(argv[:1])
    from llm_distill.cache import TeacherCache

    cache = TeacherCache.open(options.cache)
    print(cache.summary())
    damaged = cache.verify()
    if damaged:
        raise ValueError(f"{len(damaged)} damaged: {', '.join(damaged)}. `llm-distill capture` makes them again.")
    print(f"All {len(cache.shards)} shards are whole.")
    if argv[1:]:
        from llm_distill.capture.report import report_fidelity

        script, args, model, _ = parse("capture", argv[1:])  # so that the YAML of either serves
        teacher, data = build_capture(script, args, model)
        report_fidelity(teacher, load_student(data, model), data, cache)
    elif cache.manifest.get("fidelity"):
        print(printable(cache.manifest["fidelity"]["table"]))
