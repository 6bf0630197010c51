"""`llm-distill push`."""

from __future__ import annotations

from collections.abc import Sequence

from llm_distill.cli.parsing import Parser, errors_in_one_line

DESCRIPTION = """Uploads a student to the Hub, with a model card that says what was distilled from what, how, and how
well. Nothing that is secret or local goes there, no checkpoint, and nothing over another run's repository. A push
that broke off goes on where it was."""
EXAMPLE = "  llm-distill push runs/student somebody/qwen-0.5b-from-7b --merge_adapters --report runs/report/report.json"


def push(argv: Sequence[str]) -> None:
    """Uploads a student with its card: `llm-distill push`."""
    parser = Parser("push", DESCRIPTION, EXAMPLE)
    parser.add_argument("folder", help="that of a run, or one of its checkpoints")
    parser.add_argument("repo_id", help="the model repository, user/name; it is made if need be")
    parser.add_argument("--merge_adapters", action="store_true", help="make LoRA adapters part of the weights")
    parser.add_argument("--base_model", help="Hub id of what the student was before, where that was a local folder")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    parser.add_argument("--force", action="store_true", help="overwrite what another run has left there")
    parser.add_argument("--report", help="a gap report (report.json) for the card; default: the one in the folder")
    parser.add_argument("--dataset", help="Hub id of the data that it learned from, for the card")
    parser.add_argument("--revision", help="the branch; default: main")
    with errors_in_one_line():
        options = vars(parser.parse(argv))
        from llm_distill.publish.student import push_student

        commit = push_student(options.pop("folder"), options.pop("repo_id"), **options)
        print(f"Pushed to {commit.repo_url}")
