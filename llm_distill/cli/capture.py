"""`llm-distill capture`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_distill.cli.build import build_capture, load_student
from llm_distill.cli.parsing import errors_in_one_line, parse


@errors_in_one_line
def capture(argv: Sequence[str]) -> None:
    """Stores a teacher's answers to a dataset: `llm-distill capture`, and `recipes/capture.py`."""
    script, args, model, options = parse("capture", argv)
    from llm_distill.cache.methods import make_method
    from llm_distill.capture.report import report_fidelity
    from llm_distill.capture.run import capture as fill

    if options.cache_method is not None:
        make_method(options.cache_method, **options.cache_kwargs)  # a mistake is found before the teacher is loaded
    folder = args.teacher_cache or str(Path(args.output_dir, "teacher_cache"))
    teacher, data = build_capture(script, args, model)
    name = options.cache_method or ("hybrid" if args.divergence == "forward_kl" and teacher.k is None else "top_k")
    told = {"k": teacher.k} if teacher.k and name == "top_k" else {}
    method = make_method(name, **(told | options.cache_kwargs))
    cache = fill(
        teacher,
        data,
        folder,
        method,
        drop_stale=options.drop_stale,
        examples_per_shard=options.examples_per_shard,
    )
    data.accelerator.print(cache.summary())
    report_fidelity(teacher, load_student(data, model), data, cache)
    if options.cache_hub_id is not None and data.accelerator.is_main_process:
        from llm_distill.publish.datasets import push_cache

        print(f"Pushed to {push_cache(cache, options.cache_hub_id, private=options.cache_hub_private)}")
    data.accelerator.print(f"Train from it with --teacher_cache {folder}")
    data.accelerator.end_training()
