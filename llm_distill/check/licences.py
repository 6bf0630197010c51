"""What the licences of teacher and student ask of a student that is passed on. A reminder, no legal advice.

A student that starts from another model's weights is derived from it. What a teacher's licence says of a model that
learned from its outputs differs: most say nothing, some want a name or a notice, some call it derived, some forbid it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from llm_distill.check.report import Finding

READ = "read its text before you pass the student on; this is no legal advice"


@dataclass(frozen=True)
class Licence:
    """What it asks of the student, by what the model with this licence was to it."""

    as_start: str = ""
    """Of one that started from its weights."""
    as_teacher: str = ""
    """Of one that learned from its outputs."""
    is_commercial: bool = True
    teaches_only: str = ""
    """The only kind of model that its outputs may improve; otherwise any."""


NOTICE = "keep its copyright notice and licence text"
_PERMISSIVE = Licence(as_start=NOTICE)
_LLAMA_3_1 = {
    f"llama{version}": Licence(
        as_start=f"begin the student's name with “Llama”, show “Built with Llama”, pass on the Llama {version} "
        "licence, its notice and the acceptable use policy; above 700 million monthly users Meta must be asked",
        as_teacher="begin the student's name with “Llama”, if it is passed on",
    )
    for version in ("3.1", "3.2", "3.3", "4")
}
_OPENRAIL = Licence(
    as_start="pass on its use restrictions and notices",
    as_teacher="a distilled student counts as derived: pass on its use restrictions and notices",
)
_CREDIT = "credit it, link its licence and say what was changed"
_UNSETTLED = "whether a model that learned from its outputs is bound as well is not settled"

LICENCES: dict[str, Licence] = {
    **dict.fromkeys(
        ("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "ecl-2.0", "zlib"), _PERMISSIVE
    ),
    **dict.fromkeys(("unlicense", "cc0-1.0", "wtfpl", "0bsd"), Licence()),
    "cc-by-4.0": Licence(as_start=_CREDIT),
    "cc-by-sa-4.0": Licence(as_start=f"{_CREDIT}; pass it on under the same licence"),
    "cc-by-nc-4.0": Licence(_CREDIT, _UNSETTLED, is_commercial=False),
    "cc-by-nc-sa-4.0": Licence(f"{_CREDIT}; pass it on under the same licence", _UNSETTLED, is_commercial=False),
    "cc-by-nc-nd-4.0": Licence("changed versions may not be passed on", _UNSETTLED, is_commercial=False),
    "gpl-3.0": Licence(as_start="pass it on under the same licence"),
    "agpl-3.0": Licence(as_start="pass it on under the same licence, to those who use it over a network too"),
    **dict.fromkeys(
        ("openrail", "bigscience-openrail-m", "bigscience-bloom-rail-1.0", "bigcode-openrail-m"), _OPENRAIL
    ),
    "llama2": Licence(
        as_start="pass on the Llama 2 licence, its notice and the acceptable use policy; above 700 million monthly "
        "users Meta must be asked",
        teaches_only="Llama 2 or what is derived from it",
    ),
    "llama3": Licence(
        as_start="begin the student's name with “Llama 3”, show “Built with Meta Llama 3”, pass on the licence, its "
        "notice and the acceptable use policy; above 700 million monthly users Meta must be asked",
        teaches_only="Meta Llama 3 or what is derived from it",
    ),
    **_LLAMA_3_1,
    "gemma": Licence(
        as_start="pass on the Gemma terms, their prohibited uses and a notice that files were changed",
        as_teacher="a distilled student counts as a derivative: pass on the terms, their prohibited uses and notice",
    ),
    "qwen": Licence(
        as_start="show “Built with Qwen” or “Improved using Qwen”, pass on the licence and its notice; above 100 "
        "million monthly users Alibaba Cloud must be asked",
        as_teacher="show “Built with Qwen” or “Improved using Qwen” in the documentation, if it is passed on",
    ),
    "qwen-research": Licence(
        as_start="show “Built with Qwen” or “Improved using Qwen”, pass on the licence and its notice",
        as_teacher="show “Built with Qwen” or “Improved using Qwen” in the documentation, if it is passed on",
        is_commercial=False,
    ),
    "tongyi-qianwen": Licence(
        as_start="pass on the licence and its notice; above 100 million monthly users Alibaba Cloud must be asked",
        teaches_only="Tongyi Qianwen or what is derived from it",
    ),
    "tongyi-qianwen-research": Licence(
        as_start="pass on the licence and its notice",
        teaches_only="Tongyi Qianwen or what is derived from it",
        is_commercial=False,
    ),
    **dict.fromkeys(
        ("mrl", "mnpl"),
        Licence("pass on the licence and its notice", "a student counts as derived", is_commercial=False),
    ),
}
"""By `license` or, where that is "other", by `license_name` of a model card, as their owners write them."""


Model = tuple[str, str | None]
"""A folder or a Hub id, and a revision."""


def check_licences(student: Model, teachers: Sequence[Model]) -> Iterator[Finding]:
    """What each asks, by its model card."""
    card = read_card(*student)
    own = None if isinstance(card, str) else licence_name(card)
    yield _check_licence("student", card, own)
    for number, teacher in enumerate(teachers, 1):
        yield _check_licence(f"teacher {number}" if len(teachers) > 1 else "teacher", read_card(*teacher), own)


def _check_licence(role: str, card: dict[str, Any] | str, student: str | None) -> Finding:
    """`card` is that of the run's "student" or of a teacher, `student` the student's own licence."""
    what = f"{role}'s licence"
    if isinstance(card, str):
        is_skipped = "reached" in card
        return Finding("skipped" if is_skipped else "amber", what, card, "" if is_skipped else "ask whose it is")
    name = licence_name(card)
    if name is None:
        return Finding("amber", what, "its model card names none", "ask who made it under which terms it is")
    licence = LICENCES.get(name)
    if licence is None:
        return Finding("amber", what, f"{name}: what it asks is not known here", READ)
    if role != "student" and licence.teaches_only and student != name:
        return Finding(
            "red",
            what,
            f"{name}: its outputs may improve no other language model than {licence.teaches_only}",
            "choose another teacher, or a student of that family; with its owner's permission, --check false starts "
            "anyway",
        )
    asked = [licence.as_start if role == "student" else licence.as_teacher]
    asked += [] if licence.is_commercial else ["no commercial use"]
    asked = [terms for terms in asked if terms]
    if asked in ([], [NOTICE]):
        return Finding("green", what, "; ".join([name, *asked]))
    return Finding("amber", what, name, f"{'; '.join(asked)} ({READ})")


def licence_name(card: Mapping[str, Any]) -> str | None:
    """In lower case; that of an "other" one."""
    licences = card.get("license")
    name = licences[0] if isinstance(licences, list) and licences else licences
    name = card.get("license_name") or name if name in ("other", None) else name
    return None if name is None else str(name).lower()


def read_card(name_or_path: str, revision: str | None = None) -> dict[str, Any] | str:
    """The metadata of a model's card, from its folder or the Hub; or why there is none, in words."""
    try:
        if os.path.isdir(name_or_path):
            text = Path(name_or_path, "README.md").read_text(encoding="utf-8")
        elif not name_or_path:
            return "it was made from a configuration: it has no model card"
        else:
            text = Path(hf_hub_download(name_or_path, "README.md", revision=revision)).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            return "not checked: the Hub cannot be reached, and its model card is not in the cache"
        return "its folder has no model card (README.md)"
    except (OSError, ValueError):
        return "its model card cannot be read"
    if not text.startswith("---"):
        return {}
    try:
        metadata = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return "the metadata of its model card is not YAML"
    return metadata if isinstance(metadata, dict) else {}
