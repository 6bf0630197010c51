"""`llm-distill push`."""

from __future__ import annotations

from collections.abc import Sequence

from llm_distill.cli.parsing import Parser, errors_in_one_line

DESCRIPTION = """Uploads a student to the Hub, with a model card that says what was distilled from what, how, and how
well. Nothing that is secret or local goes there, no checkpoint, and nothing over another run's repository. A push
that broke off goes on where it was."""
EXAMPLE = "llm-distill push runs/student somebody/qwen-0.5b-from-7b --merge_adapters --report runs/report/report.json"


@errors_in_one_line
def push(argv: Sequence[str]) -> None:
    """Uploads a student with its card: `llm-distill push`."""
    parser = Parser("push", DESCRIPTION, EXAMPLE)
    parser.add_argument("folder", help="The student is in this folder, which is that of a run or of a checkpoint.")
    parser.add_argument("repo_id", help="It goes to this repository, user/name, which is made if it is not there.")
    parser.add_argument("--merge_adapters", action="store_true", help="LoRA adapters become part of the weights.")
    parser.add_argument(
        "--base_model", help="The student was this model of the Hub before training. Needed where that was a folder."
    )
    parser.add_argument("--private", action="store_true", default=None, help="The repository is private.")
    parser.add_argument("--force", action="store_true", help="What another run has left there is overwritten.")
    parser.add_argument("--report", help="The card shows this gap report (report.json). By default the folder's own.")
    parser.add_argument("--dataset", help="The card says that the student learned from this dataset of the Hub.")
    parser.add_argument("--revision", help="It goes to this branch. By default it is main.")
    options = vars(parser.parse(argv))
    from llm_distill.publish.student import prepare_push

    commit = prepare_push(options.pop("folder"), options.pop("repo_id"), **options)()
    print(f"Pushed to {commit.repo_url}")
