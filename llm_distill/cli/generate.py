"""`llm-distill generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_distill.cli.parsing import errors_in_one_line, parse
from llm_distill.data.load import load_data


@errors_in_one_line
def generate(argv: Sequence[str]) -> None:
    """Has the teacher write completions and keeps the good ones: `llm-distill generate`."""
    script, config = parse("generate", argv)
    from llm_distill.generation.engines.choose import make_engine
    from llm_distill.generation.engines.endpoint import BudgetReachedError
    from llm_distill.generation.prompts import prompts_of
    from llm_distill.generation.run import ACCEPTED, read_report
    from llm_distill.generation.run import generate as write
    from llm_distill.ranks import ranks

    print_once = ranks().print
    filters = config.make_filters()
    if not script.dataset_name:
        raise ValueError("--dataset_name is missing: prompts, as a Hub id, a folder, a file, or `stdlib`.")
    data, output = Path(script.dataset_name).resolve(), Path(config.output_dir).resolve()
    if data.exists() and output in (data, *data.parents):
        raise ValueError(f"the prompts of {data} lie in output_dir: choose another folder for the texts.")
    dataset = load_data(script)[script.dataset_train_split]
    engine = make_engine(config)
    prompts = list(
        prompts_of(
            dataset,
            column=config.prompt_column,
            as_chat=config.as_chat,
            system_prompt=config.system_prompt,
            prompt_tokens=config.prompt_tokens,
            tokenizer=engine.tokenizer,
            limit=config.max_prompts,
        )
    )
    try:
        report = write(engine, prompts, config.output_dir, filters=filters, retry_refused=config.retry_refused)
    except BudgetReachedError as reached:
        print_once(f"Stopped: {reached}")
        report = read_report(config.output_dir)
    print_once(f"\n{report.as_markdown()}\n")
    if report.unanswered:
        print_once("Prompts without an answer are asked again with --retry_refused true.")
    if config.generated_hub_id is not None and ranks().is_main_process:
        from llm_distill.publish.datasets import push_generated

        assert isinstance(config.filters, dict), "GenerateConfig has parsed it"
        where = push_generated(
            config.output_dir, config.generated_hub_id, filters=config.filters, private=config.generated_hub_private
        )
        print(f"Pushed to {where}")
    print_once(
        f"The texts are in {Path(config.output_dir, ACCEPTED)}. Train on them with --dataset_name {config.output_dir}"
    )
