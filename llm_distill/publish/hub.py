"""What every push to the Hub needs: a place that nothing else is in, whose outputs these are and under which terms, and
errors in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, ModelCard, RepoUrl

from llm_distill.tables import as_code, escape_markdown

TAGS = ["llm-distill", "knowledge-distillation"]
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Raises:
    ValueError: no right to write there.
    ConnectionError: the push broke off.
    """
    try:
        yield
    except (ValueError, PermissionError):
        raise
    except Exception as error:  # of the HTTP client, of Xet, of huggingface_hub: they have no base in common
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
            raise ValueError(
                f"the Hub does not let you write to {repo_id}. Log in with `hf auth login`, or set HF_TOKEN to a token "
                f"that may write there. ({error})"
            ) from error
        raise ConnectionError(
            f"the push to {repo_id} broke off. What has arrived stays, and so does all that is here; the same push "
            f"goes on from there. ({error})"
        ) from error


def claim_repository(
    api: HfApi,
    repo_id: str,
    what: str,
    file: str,
    changes: Callable[[Path], list[str]],
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    force: bool = False,
    way_out: str = "or delete that one",
) -> RepoUrl:
    """Makes the repository if need be, and sees that nothing else is in it.

    Args:
        what: that is to be there, in words.
        file: by which it is known.
        changes: tells in what such a file differs from the one that will be pushed.
        force: whatever is there may be overwritten.
        way_out: beside another name.

    Raises:
        ValueError: another one of its kind is there, or something else.
        Exception: of huggingface_hub, for `hub_errors`.
    """
    url = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
    api.auth_check(url.repo_id, repo_type=repo_type, write=True)  # create_repo is content with another's repository
    if revision is not None:
        api.create_branch(url.repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
    names = [] if force else api.list_repo_files(url.repo_id, repo_type=repo_type, revision=revision)
    if file in names:
        path = api.hf_hub_download(url.repo_id, file, repo_type=repo_type, revision=revision)
        if changed := changes(Path(path)):
            raise ValueError(
                f"{url.repo_id} holds another {what}: {'; '.join(changed[:4])}. Choose another name, {way_out}."
            )
    elif other := [name for name in names if name not in (".gitattributes", "README.md", "LICENSE")]:
        raise ValueError(
            f"{url.repo_id} is no {what} and has other things in it, such as {other[0]}. Choose another name, "
            f"{way_out}."
        )
    return url


def size_category(rows: int) -> str:
    """As dataset cards write it."""
    return "n<1K" if rows < 1000 else "<n<".join(SIZES[len(str(rows)) - 4 :][:2])


def licence_of(teacher: dict[str, Any], api: HfApi) -> dict[str, Any]:
    """What the teacher's own card says; nothing where it cannot be read, or where several teachers disagree."""
    licences: list[dict[str, Any]] = []
    for member in teachers_of(teacher):
        if not member.get("revision"):
            return {}  # not of the Hub
        try:
            card = ModelCard.load(api.hf_hub_download(member["model"], "README.md", revision=member["revision"]))
        except Exception:  # no right to read it, no network, no card, not YAML
            return {}
        data = card.data.to_dict()
        licences.append({name: data[name] for name in ("license", "license_name", "license_link") if name in data})
    return common_licence(licences)


def common_licence(licences: list[dict[str, Any]]) -> dict[str, Any]:
    """The licence that all of them have. Where they differ it is the owner's to say."""
    return licences[0] if licences and all(licence == licences[0] for licence in licences) else {}


def terms_of(licence: dict[str, Any]) -> str:
    """What a card calls it, with a link if it has one."""
    terms = licence.get("license_name") or licence.get("license") or "not known here"
    link, terms = str(licence.get("license_link")), escape_markdown(str(terms))
    return f"[{terms}]({quote(link, ':/?#=&%')})" if re.match("https?://", link) else terms


def teachers_of(teacher: dict[str, Any]) -> list[dict[str, Any]]:
    """One, or the members of an ensemble."""
    return teacher.get("ensemble", [teacher])


def link_to(model: dict[str, Any]) -> str:
    """For a card: its name, a link where it is of the Hub, and in which form it was loaded."""
    name, revision, bits = model.get("model"), model.get("revision"), model.get("bits")
    linked = f"[{escape_markdown(str(name))}](https://huggingface.co/{quote(str(name))})" if revision else None
    about = (revision, model.get("dtype"), f"{bits} bits" if bits else None)
    return ", ".join(
        [linked or as_code(str(name or model.get("architecture"))), *(escape_markdown(x) for x in about if x)]
    )
