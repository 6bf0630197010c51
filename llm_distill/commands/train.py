"""`llm-distill train`."""

from __future__ import annotations

from collections.abc import Sequence

from llm_distill.commands.options import build_trainer, errors_in_one_line, parse_train


def train(argv: Sequence[str]) -> None:
    """Trains a student on a teacher's distributions: `llm-distill train`, and `recipes/token_kl.py`."""
    from llm_distill import corpus
    from llm_distill.leaks import public_value
    from llm_distill.run_record import run_options

    with errors_in_one_line():
        script, args, model = parse_train(argv)
        options = run_options(script, args, model)
        trainer = build_trainer(script, args, model)
        trainer.command, trainer.options = ["llm-distill", "train", *argv], options
        trainer.record["data.name"] = public_value(script.dataset_name)
        resumption = _resumption(args.resume_from_checkpoint)
        trainer.require_resumable(resumption)
    dataset = None if script.dataset_name == corpus.NAME else script.dataset_name
    trainer.train(resume_from_checkpoint=resumption)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        with errors_in_one_line():
            try:
                trainer.push_to_hub(dataset_name=dataset)  # saves both first
            except (ValueError, ConnectionError) as error:
                raise ValueError(f"the student is in {args.output_dir}, but is not on the Hub: {error}") from error
    else:
        trainer.save_model()
        trainer.create_model_card(dataset_name=dataset)
    trainer.accelerator.print(f"The student is in {args.output_dir}.")
    trainer.end()


def _resumption(value: str | None) -> str | bool:
    """`--resume_from_checkpoint true` means the last one; otherwise it is a folder."""
    return {"none": False, "false": False, "true": True}.get(str(value).lower(), value or False)
