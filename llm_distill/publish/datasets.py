"""What a teacher has said, as a dataset repository on the Hub: a cache of its signals, or texts that it wrote. A card
says whose they are, how they were made and under which terms.

A push that broke off goes on where it was. Hundreds of shards travel in several commits; the first has the manifest, by
which the repository of another cache is told apart and an incomplete one is found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, HfApi, RepoUrl

from llm_distill.cache import manifest as manifests
from llm_distill.cache.store import TeacherCache
from llm_distill.files import differences, write_atomically
from llm_distill.generation.journal import IDENTITY, SETTINGS_FILE, read_settings
from llm_distill.generation.run import ACCEPTED, REPORT, GenerationReport, read_report
from llm_distill.leaks import refuse_leaks
from llm_distill.publish.hub import (
    TAGS,
    claim_repository,
    hub_errors,
    licence_of,
    link_to,
    size_category,
    teachers_of,
    terms_of,
)

CACHE_FILES = [manifests.FILE, "shard-*.parquet", manifests.HEAD_FILE, manifests.PLOT_FILE]
TEXT_FILES = [SETTINGS_FILE, ACCEPTED, REPORT]


def push_cache(cache: TeacherCache, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads what is not there yet; the repository's URL.

    Args:
        cache: a local one.
        repo_id: a dataset repository, `user/name`, which is made if need be.
        private: whether it is made so that others cannot see it; otherwise as is usual where it lies.
        token: by default that of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: no right to write there, another thing is there, a bad name, a damaged cache or one that is remote.
        PermissionError: the card cannot be written beside the cache.
        ConnectionError: the push broke off. What has arrived stays.
    """
    if not cache.is_local:
        raise ValueError(f"{cache.path} is not a local folder: download it before you push it elsewhere.")
    cache.refresh()
    if damaged := cache.verify():
        raise ValueError(f"damaged, so not pushed: {', '.join(damaged)}. `llm-distill capture` makes them again.")

    def changes(path: Path) -> list[str]:
        there = manifests.parse_manifest(path.read_bytes(), f"{repo_id}/{manifests.FILE}")
        stored, wanted = ({name: of[name] for name in manifests.IDENTITY} for of in (there, cache.manifest))
        return differences(stored, wanted, ignore_missing=False)

    api = HfApi(token=token)
    with hub_errors(repo_id):
        url = claim_repository(api, repo_id, "teacher cache", manifests.FILE, changes, "dataset", private or None)
        cache.record_contents()
        card = cache_card(cache, url.repo_id, licence_of(cache.manifest["teacher"], api))
        message = f"{len(cache):,} texts, {cache.num_rows:,} tokens"
        return _upload(api, url, Path(cache.path), CACHE_FILES, card, message)


def push_generated(
    folder: str | Path, repo_id: str, *, filters: dict[str, Any], private: bool = False, token: str | None = None
) -> str:
    """Uploads what was accepted in the folder of a run, with report and card; the repository's URL. Rejected texts stay
    here. `filters` are named in the card; all else is as for `push_cache`.
    """
    folder = Path(folder)
    settings, report = read_settings(folder), read_report(folder)

    def changes(path: Path) -> list[str]:
        return differences(read_settings(path.parent), {name: settings[name] for name in IDENTITY}, "the repository")

    api = HfApi(token=token)
    with hub_errors(repo_id):
        what = "set of generated texts"
        url = claim_repository(api, repo_id, what, SETTINGS_FILE, changes, "dataset", private or None)
        card = texts_card(settings, report, filters, url.repo_id, licence_of(settings["teacher"], api))
        return _upload(api, url, folder, TEXT_FILES, card, f"{report.accepted:,} texts")


def _upload(api: HfApi, url: RepoUrl, folder: Path, files: list[str], card: str, message: str) -> str:
    write_atomically(folder / manifests.CARD_FILE, card.encode())
    for name in (name for name in (*files, manifests.CARD_FILE) if not name.endswith(".parquet")):
        refuse_leaks(folder, url.repo_id, name)
    api.upload_folder(
        repo_id=url.repo_id,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=[*files, manifests.CARD_FILE],
        commit_message=message,
    )
    return str(url)


def cache_card(cache: TeacherCache, repo_id: str, licence: dict[str, Any]) -> str:
    """Markdown: what it is, whose, how true, how to use it. Nothing local, nothing secret."""
    manifest = cache.manifest
    rows = {
        **{f"tokenizer: {name}": value for name, value in manifest["tokenizer"].items() if value},
        "tokenizer: tokens": f"{manifest['vocab_size']:,}",
        "kept of each distribution": f"`{cache.method}`",
        "temperature": f"{manifest['temperature']:g}",
        "texts": f"{len(cache):,}",
        "tokens": f"{cache.num_rows:,}",
        "bytes a token": f"{cache.num_bytes / max(cache.num_rows, 1):.1f}",
    }
    about = (
        "What a teacher says about every token of some texts, stored by llm-distill: students are distilled from it "
        "without running the teacher. The texts are not in it, only hashes of their token ids to find them by. But "
        "much of a text can be guessed from what the teacher says about it."
    )
    sections = []
    if fidelity := (manifest.get("fidelity") or {}).get("table"):
        sections.append(f"## Fidelity\n\nTo the live teacher, on a sample:\n\n{fidelity}")
    if Path(cache.path, manifests.PLOT_FILE).is_file():
        sections.append(f"![Fidelity and size]({manifests.PLOT_FILE})")
    options = yaml.safe_dump({"teacher_cache": repo_id, **manifest.get("data", {})}, sort_keys=False)
    sections.append(
        f"## Train from it\n\n```yaml\n{options}```\n\n`llm-distill train --config FILE --model_name_or_path STUDENT "
        f"--dataset_name TEXTS`, with a student that has this tokenizer. `hf://datasets/{repo_id}` reads over the "
        "network what is needed, instead of all at once."
    )
    files, size = "shard-*.parquet", len(cache)
    return _card(repo_id, manifest["teacher"], licence, "teacher-cache", files, size, about, rows, sections)


def texts_card(
    settings: dict[str, Any],
    report: GenerationReport,
    filters: dict[str, Any],
    repo_id: str,
    licence: dict[str, Any],
) -> str:
    """Markdown. Nothing local, nothing secret: of a verifier or an expression of the user's only the name is told."""
    rows = {name.replace("_", " "): str(value) for name, value in settings["sampling"].items()}
    rows["filters"] = ", ".join(filters) or "none"
    about = "What a teacher wrote after the prompts, by llm-distill, for students to learn from."
    sections = [
        f"## What was kept\n\n{report.as_markdown()}",
        f"## Train on it\n\n```bash\nllm-distill train --dataset_name {repo_id} --kd_weight 0 --ce_weight 1 \\\n"
        "    --model_name_or_path STUDENT --output_dir student\n```",
    ]
    size = report.accepted
    return _card(repo_id, settings["teacher"], licence, "synthetic", ACCEPTED, size, about, rows, sections)


def _card(
    repo_id: str,
    teacher: dict[str, Any],
    licence: dict[str, Any],
    tag: str,
    data_files: str,
    size: int,
    about: str,
    rows: dict[str, str],
    sections: list[str],
) -> str:
    members = teachers_of(teacher)
    header = DatasetCardData(
        tags=[*TAGS, tag],
        pretty_name=repo_id.split("/")[-1],
        task_categories=["text-generation"],
        annotations_creators=["machine-generated"],
        size_categories=[size_category(size)],
        base_model=[member["model"] for member in members if member.get("revision")] or None,
        configs=[{"config_name": "default", "data_files": data_files}],
        **licence,
    )
    cells = [*(("teacher", link_to(member)) for member in members), *rows.items()]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])
    owner = (
        f"## Licence\n\nThe teacher's is {terms_of(licence)}. It governs the teacher's outputs, and so what is here."
    )
    parts = [f"---\n{header.to_yaml()}\n---", f"# {header.pretty_name}", about, table, owner, *sections]
    return "\n\n".join(parts) + "\n"
