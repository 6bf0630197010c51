"""A cache as a dataset repository on the Hub, with a card that says whose signals these are and how true.

A push that broke off goes on where it was. Hundreds of shards travel in several commits; the first has the manifest, by
which the repository of another cache is told apart and an incomplete one is found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, HfApi

from llm_distill.cache import manifest as manifests
from llm_distill.cache.store import TeacherCache
from llm_distill.files import differences, write_atomically
from llm_distill.publish.hub import hub_errors, licence_of, named, size_category, teachers_of

FILES = [manifests.FILE, "shard-*.parquet", manifests.HEAD_FILE, manifests.PLOT_FILE, manifests.CARD_FILE]
TAGS = ["llm-distill", "knowledge-distillation", "teacher-cache"]


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
    api = HfApi(token=token)
    with hub_errors(repo_id):
        url = api.create_repo(repo_id, private=private or None, repo_type="dataset", exist_ok=True)
        _require_place_for(cache, api, url.repo_id)
        cache.record_contents()
        card = dataset_card(cache, url.repo_id, licence_of(cache.manifest["teacher"], api))
        write_atomically(Path(cache.path, manifests.CARD_FILE), card.encode())
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type="dataset",
            folder_path=cache.path,
            allow_patterns=FILES,
            commit_message=f"{len(cache):,} texts, {cache.num_rows:,} tokens",
        )
    return str(url)


def dataset_card(cache: TeacherCache, repo_id: str, licence: dict[str, Any]) -> str:
    """Markdown: what it is, whose, how true, how to use it. Nothing local, nothing secret.

    Args:
        cache: a cache.
        repo_id: where it will be.
        licence: the teacher's `license`, `license_name` and `license_link`, as far as they are known.
    """
    manifest, texts, teachers = cache.manifest, len(cache), teachers_of(cache.manifest["teacher"])
    data = DatasetCardData(
        tags=TAGS,
        pretty_name=repo_id.split("/")[-1],
        task_categories=["text-generation"],
        annotations_creators=["machine-generated"],
        size_categories=[size_category(texts)],
        base_model=[teacher["model"] for teacher in teachers if teacher.get("revision")] or None,
        configs=[{"config_name": "default", "data_files": "shard-*.parquet"}],
        **licence,
    )
    table = [
        *(("teacher", named(teacher)) for teacher in teachers),
        *((f"tokenizer: {name}", value) for name, value in manifest["tokenizer"].items()),
        ("tokenizer: tokens", f"{manifest['vocab_size']:,}"),
        ("kept of each distribution", f"`{cache.method}`"),
        ("temperature", f"{manifest['temperature']:g}"),
        ("texts", f"{texts:,}"),
        ("tokens", f"{cache.num_rows:,}"),
        ("bytes a token", f"{cache.num_bytes / max(cache.num_rows, 1):.1f}"),
    ]
    terms = licence.get("license_name") or licence.get("license") or "not known here"
    fidelity = (manifest.get("fidelity") or {}).get("table")
    plot = f"![Fidelity and size]({manifests.PLOT_FILE})\n" if Path(cache.path, manifests.PLOT_FILE).is_file() else ""
    options = yaml.safe_dump({"teacher_cache": repo_id, **manifest.get("data", {})}, sort_keys=False)
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n# {data.pretty_name}\n",
        "What a teacher says about every token of some texts, stored by llm-distill: students are distilled from it "
        "without running the teacher. The texts are not in it, only hashes of their token ids to find them by. But "
        "much of a text can be guessed from what the teacher says about it.\n",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table if value)]) + "\n",
        f"## Licence\n\nThe teacher's is {terms}. It governs the teacher's outputs, and so what is here.\n",
        f"## Fidelity\n\nTo the live teacher, on a sample:\n\n{fidelity}\n" if fidelity else "",
        plot,
        f"## Train from it\n\n```yaml\n{options}```\n\n"
        "`llm-distill train --config FILE --model_name_or_path STUDENT --dataset_name TEXTS`, with a student that has "
        f"this tokenizer. `hf://datasets/{repo_id}` reads over the network what is needed, instead of all at once.\n",
    ]
    return "\n".join(section for section in sections if section)


def _require_place_for(cache: TeacherCache, api: HfApi, repo_id: str) -> None:
    there = api.list_repo_files(repo_id, repo_type="dataset")
    if manifests.FILE in there:
        path = api.hf_hub_download(repo_id, manifests.FILE, repo_type="dataset")
        theirs = manifests.parse_manifest(Path(path).read_bytes(), f"{repo_id}/{manifests.FILE}")
        if manifests.identity(theirs) != cache.identity:
            ours = {name: cache.manifest[name] for name in manifests.IDENTITY}
            found = "; ".join(differences(theirs, ours))
            raise ValueError(f"{repo_id} holds another cache. {found}. Choose another name, or delete that one.")
    elif other := [name for name in there if name not in (".gitattributes", manifests.CARD_FILE)]:
        raise ValueError(f"{repo_id} is no teacher cache and has other things in it, such as {other[0]}.")
