"""Generated texts as a dataset repository on the Hub, with a card that says who wrote them, how, and what was kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, HfApi

from llm_distill.files import differences, write_atomically
from llm_distill.generation.generate import ACCEPTED, REPORT, Report, read_report
from llm_distill.generation.store import IDENTITY, SETTINGS_FILE, read_settings
from llm_distill.publish.hub import hub_errors, licence_of, named, size_category, teachers_of

CARD_FILE = "README.md"
TAGS = ["llm-distill", "knowledge-distillation", "synthetic"]


def push_generated(
    folder: str | Path, repo_id: str, *, filters: dict[str, Any], private: bool = False, token: str | None = None
) -> str:
    """Uploads what was accepted, with report and card; the repository's URL. Rejected texts stay here.

    Args:
        folder: of a run.
        repo_id: a dataset repository, `user/name`, which is made if need be.
        filters: what was kept, for the card.
        private: whether it is made so that others cannot see it.
        token: by default that of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: no right to write there, another thing is there, a bad name.
        ConnectionError: the push broke off.
    """
    folder, api = Path(folder), HfApi(token=token)
    settings, report = read_settings(folder), read_report(folder)
    with hub_errors(repo_id):
        url = api.create_repo(repo_id, private=private or None, repo_type="dataset", exist_ok=True)
        _require_place_for(settings, api, url.repo_id)
        card = dataset_card(settings, report, filters, url.repo_id, licence_of(settings["teacher"], api))
        write_atomically(folder / CARD_FILE, card.encode())
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=[ACCEPTED, REPORT, SETTINGS_FILE, CARD_FILE],
            commit_message=f"{report.accepted:,} texts",
        )
    return str(url)


def dataset_card(
    settings: dict[str, Any], report: Report, filters: dict[str, Any], repo_id: str, licence: dict[str, Any]
) -> str:
    """Markdown. Nothing local, nothing secret: of a verifier or an expression of the user's only the name is told."""
    teachers = teachers_of(settings["teacher"])
    data = DatasetCardData(
        tags=TAGS,
        pretty_name=repo_id.split("/")[-1],
        task_categories=["text-generation"],
        annotations_creators=["machine-generated"],
        size_categories=[size_category(report.accepted)],
        base_model=[teacher["model"] for teacher in teachers if teacher.get("revision")] or None,
        configs=[{"config_name": "default", "data_files": ACCEPTED}],
        **licence,
    )
    table = [
        *(("teacher", named(teacher)) for teacher in teachers),
        *((name.replace("_", " "), value) for name, value in settings["sampling"].items()),
        ("filters", ", ".join(filters) or "none"),
    ]
    terms = licence.get("license_name") or licence.get("license") or "not known here"
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n\n# {data.pretty_name}\n",
            "What a teacher wrote after the prompts, by llm-distill, for students to learn from.\n",
            "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table)]) + "\n",
            f"## What was kept\n\n{report.as_markdown()}\n",
            f"## Licence\n\nThe teacher's is {terms}. It governs the teacher's outputs, and so what is here.\n",
            f"## Train on it\n\n```bash\nllm-distill train --dataset_name {repo_id} --kd_weight 0 --ce_weight 1 \\\n"
            "    --model_name_or_path STUDENT --output_dir student\n```\n",
        ]
    )


def _require_place_for(settings: dict[str, Any], api: HfApi, repo_id: str) -> None:
    there = api.list_repo_files(repo_id, repo_type="dataset")
    if SETTINGS_FILE in there:
        path = api.hf_hub_download(repo_id, SETTINGS_FILE, repo_type="dataset")
        ours = {name: settings[name] for name in IDENTITY}
        if found := differences(read_settings(Path(path).parent), ours, "the repository"):
            raise ValueError(
                f"{repo_id} holds other texts. {'; '.join(found)}. Choose another name, or delete that one."
            )
    elif other := [name for name in there if name not in (".gitattributes", CARD_FILE)]:
        raise ValueError(f"{repo_id} is no set of generated texts and has other things in it, such as {other[0]}.")
