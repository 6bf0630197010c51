"""A student as a model repository: what is needed to run it and to know it, and nothing that is secret or local."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants
from transformers.dynamic_module_utils import get_relative_import_files

from llm_distill.evaluation.report import GapReport
from llm_distill.files import read_json
from llm_distill.leaks import refuse_leaks
from llm_distill.publish.adapters import ADAPTER_CONFIG, load_merged
from llm_distill.publish.card import (
    CARD_FILE,
    PICTURES,
    REPORT_FILE,
    REPORT_PAGES,
    base_model_of,
    read_options,
    write_model_card,
)
from llm_distill.publish.hub import claim_repository, hub_errors
from llm_distill.publish.record import FILE, IDENTITY, OPTIONS_FILE, changes_of_run

WEIGHTS = (
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", ADAPTER_CONFIG),
)
MODEL = ("config.json", "generation_config.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
KNOWN = ("objective.kd_weight", "objective.ce_weight", "student.model")
"""What the record of every run says."""
OF_REPORT = (REPORT_FILE, *REPORT_PAGES, *PICTURES)
UPLOADED = (*WEIGHTS, *MODEL, *TOKENIZER, CARD_FILE, FILE, OPTIONS_FILE, *OF_REPORT)
"""Of a student's folder, by name, and nothing from folders within it: no checkpoint, no optimizer, no pickle."""


def prepare_push(
    folder: str | Path,
    repo_id: str,
    *,
    merge_adapters: bool = False,
    private: bool | None = None,
    force: bool = False,
    report: str | Path | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
    model_name: str | None = None,
    tags: str | list[str] | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Callable[[], CommitInfo]:
    """Refuses what can be refused, writes the card, and returns the upload, which may run in another thread.

    Args:
        folder: that of a run. Nothing is changed in it.
        repo_id: a model repository, `user/name`, which is made if need be.
        merge_adapters: whether adapters become part of the weights. Otherwise they are uploaded as they are, and
            whoever loads them loads their model too.
        private: whether the repository is made so that others cannot see it; otherwise as is usual where it lies.
        force: overwrite what another run has left there.
        report: a gap report (`report.json`, with what lies beside it) for the card; by default that in the folder.
        dataset: the Hub id of the data, for the card.
        base_model: the Hub id of what the student was before, where the record has only a local folder.
        model_name: the card's title; by default the repository's name.
        tags: further ones for the card.
        commit_message: by default "Distilled with llm-distill".
        revision: a branch, which is made if need be; by default main.
        token: by default that of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: no student there, no right to write there, another run's repository, something secret or local.
        ConnectionError: there is no network, or the push broke off (the upload raises it too). What has arrived stays,
            and so does the folder.
    """
    folder = Path(folder)
    record = read_record(folder)
    read_options(folder)
    if merge_adapters and not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"merge_adapters would have no effect: there are no adapters in {folder}.")
    base_model = base_model or base_model_of(record)
    _require_base_model(folder, base_model, merge_adapters)
    api = HfApi(token=token)
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"HF_HUB_OFFLINE is set, so nothing is pushed. All of it stays in {folder}.")
    with ExitStack() as cleanup:
        stage = Path(cleanup.enter_context(TemporaryDirectory(prefix="llm-distill-push-")))
        _stage(folder, stage, base_model, None if report is None else Path(report), merge_adapters)
        refuse_leaks(stage, public=repo_id)  # before a repository is made
        with hub_errors(repo_id):
            repo_id = require_place(api, repo_id, record, private=private, force=force, revision=revision)
        if merge_adapters:
            _merge(folder, stage)
        if dataset is not None:
            record |= {"run.dataset": dataset}
            (stage / FILE).write_text(json.dumps(record, indent=2) + "\n")
        title = model_name or repo_id.split("/")[-1]
        write_model_card(stage, name=title, repo_id=repo_id, base_model=base_model, tags=tags, api=api)
        refuse_leaks(stage, public=repo_id)
        staged = cleanup.pop_all()

    def upload() -> CommitInfo:
        with staged, hub_errors(repo_id):
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=stage,
                delete_patterns=list(UPLOADED),  # weights of another form would be loaded in their place
                commit_message=commit_message or "Distilled with llm-distill",
                revision=revision,
            )

    return upload


def read_record(folder: Path) -> dict[str, Any]:
    """Raises ValueError if no student of a run is there."""
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"there is no student in {folder}: no safetensors with a model's weights, and no adapters.")
    if not (folder / FILE).is_file():
        raise ValueError(
            f"{folder} has no {FILE}, which training leaves there, so its run is not known. Any folder: `hf upload`."
        )
    record = read_json(folder / FILE)
    if missing := [name for name in KNOWN if name not in record]:
        raise ValueError(f"{folder / FILE} is not the record of a run: it lacks {missing[0]}.")
    return record


def require_place(
    api: HfApi, repo_id: str, record: dict[str, Any], compared: Sequence[str] = IDENTITY, **options: Any
) -> str:
    """Makes a student's repository if need be; its full name. Options and errors are those of `claim_repository`."""

    def changes(path: Path) -> list[str]:
        return changes_of_run(path, record, compared, "the repository")

    way_out = "or overwrite it with `llm-distill push … --force`"
    return claim_repository(api, repo_id, "distilled student", FILE, changes, way_out=way_out, **options).repo_id


def _require_base_model(folder: Path, base_model: str | None, merge_adapters: bool) -> None:
    path = folder / ADAPTER_CONFIG
    if path.is_file() and not merge_adapters and base_model is None:
        local = read_json(path).get("base_model_name_or_path")
        raise ValueError(
            f"{ADAPTER_CONFIG}, base_model_name_or_path is {local!r}, which nobody else has: these adapters cannot be "
            "loaded from the Hub. Merge them into the weights with --merge_adapters, or say with --base_model what "
            "their model is called there."
        )


def _stage(folder: Path, stage: Path, base_model: str | None, report: Path | None, merging: bool) -> None:
    """Lays out what will be uploaded: links to the weights, and small files without what transformers and PEFT note of
    where they came from.
    """
    left_out = (*WEIGHTS, *MODEL) if merging else ()
    for name in (name for name in UPLOADED if name not in (*left_out, *OF_REPORT)):
        for path in folder.glob(name):
            _lay_out(path, stage)
    for path in _own_code(folder):
        _lay_out(path, stage)
    if report is not None or (folder / REPORT_FILE).is_file():
        report = report or folder / REPORT_FILE
        GapReport.load(report)
        shutil.copyfile(report, stage / REPORT_FILE)
        for name in (*REPORT_PAGES, *PICTURES):
            _lay_out(report.parent / name, stage)
    for name, field, public in (
        ("config.json", "_name_or_path", None),
        ("tokenizer_config.json", "name_or_path", None),
        (ADAPTER_CONFIG, "base_model_name_or_path", base_model),
    ):
        content = read_json(stage / name) if (stage / name).is_file() else {}
        if field in content:
            content = {
                key: value for key, value in (content | {field: public}).items() if (key, value) != (field, None)
            }
            (stage / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _lay_out(path: Path, stage: Path) -> None:
    """A file, if there is one. Raises ValueError for a link to what lies somewhere else."""
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError(f"{path} is a link to something outside of its folder: put the file itself there.")
    if path.is_file() and path.suffix == ".safetensors":
        (stage / path.name).symlink_to(path.resolve())
    elif path.is_file():
        shutil.copyfile(path, stage / path.name)


def _own_code(folder: Path) -> list[Path]:
    """The modules of a model or a tokenizer that transformers does not have, without which it does not load."""
    modules: set[Path] = set()
    for name in ("config.json", "tokenizer_config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        classes = [
            part
            for value in content.get("auto_map", {}).values()
            for part in ([value] if isinstance(value, str) else value)
        ]
        own = {folder / f"{part.split('.')[0]}.py" for part in classes if part and "--" not in part}
        modules |= {
            Path(path) for module in own if module.is_file() for path in (module, *get_relative_import_files(module))
        }
    return sorted(modules)


def _merge(folder: Path, stage: Path) -> None:
    model = load_merged(folder)
    model.config._name_or_path = ""
    model.save_pretrained(stage)
