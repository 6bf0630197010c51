"""What every push of a teacher's outputs to the Hub needs: whose they are, under which terms, and errors in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, ModelCard

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


def size_category(rows: int) -> str:
    """As dataset cards write it."""
    return "n<1K" if rows < 1000 else "<n<".join(SIZES[len(str(rows)) - 4 :][:2])


def licence_of(teacher: dict[str, Any], api: HfApi) -> dict[str, Any]:
    """What the teacher's own card says; nothing where it cannot be read, or where several teachers disagree."""
    found: list[dict[str, Any]] = []
    for member in teachers_of(teacher):
        if not member.get("revision"):
            return {}  # not of the Hub
        try:
            card = ModelCard.load(api.hf_hub_download(member["model"], "README.md", revision=member["revision"]))
        except Exception:  # no right to read it, no network, no card, not YAML
            return {}
        said = card.data.to_dict()
        found.append({name: said[name] for name in ("license", "license_name", "license_link") if name in said})
    return found[0] if all(each == found[0] for each in found) else {}


def teachers_of(teacher: dict[str, Any]) -> list[dict[str, Any]]:
    """One, or the members of an ensemble."""
    return teacher.get("ensemble", [teacher])


def named(teacher: dict[str, Any]) -> str:
    """For a card, with a link where it is of the Hub."""
    name, revision, bits = (teacher.get(field) for field in ("model", "revision", "bits"))
    name = f"[{name}](https://huggingface.co/{name})" if revision else f"`{name or teacher.get('architecture')}`"
    return ", ".join(filter(None, [name, revision, teacher.get("dtype"), f"{bits} bits" if bits else None]))
