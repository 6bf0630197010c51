"""What must not leave this machine, secrets and local places: found in files, and taken out of options."""

from __future__ import annotations

import functools
import getpass
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import get_token

from llm_distill.options import read_yaml

PLUGINS = (
    "AWSKeyDetector",
    "AzureStorageKeyDetector",
    "BasicAuthDetector",
    "DiscordBotTokenDetector",
    "GitHubTokenDetector",
    "GitLabTokenDetector",
    "JwtTokenDetector",
    "MailchimpDetector",
    "NpmDetector",
    "OpenAIDetector",
    "PrivateKeyDetector",
    "PypiTokenDetector",
    "SendGridDetector",
    "SlackDetector",
    "SquareOAuthDetector",
    "StripeDetector",
    "TelegramBotTokenDetector",
    "TwilioKeyDetector",
)
"""Of detect-secrets, those that know the form of a key; its guesses by entropy would take much code for secrets."""
KEY = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|hf_oauth_[\w.-]{16,}|api_org_[A-Za-z0-9]{12,}|github_pat_\w{22,}|sk-[\w-]{20,}"
    r"|(?:gsk|r8|fw|npm|pcsk)_[A-Za-z0-9]{20,}|(?:pplx|xai|csk)-[A-Za-z0-9]{20,}|(?:nvapi|GOCSPX|xapp)-[\w-]{20,}"
    r"|(?:tgp_v1|lsv2_[a-z]{2}|dckr_pat|wandb_v1|jina)_[\w-]{32,}|(?:dapi|dop_v1_)[0-9a-f]{32}|AIza[\w-]{35}"
    r"|ya29\.[\w-]{20,}|Bearer\s+(?=\S*\d)[\w.~+/=-]{16,}|[A-Za-z]\w*://[^/\s:@]+:[^/\s@]+@)"
    r"|-----BEGIN [A-Z0-9 ]*PRIVATE KEY"
)
"""Forms that detect-secrets does not know, most of them of those who serve models."""
SECRET_NAME = re.compile(
    r"(?:^|_)(?:token|\w*key|secret|password|passwd|passphrase|pwd|auth|authorization|credentials?|cookies?|headers)$"
)
"""What is called like this is nobody's business, whatever it is; but for the tokens that a tokenizer has."""
TOKENIZER_TOKEN = re.compile(r"(?:bos|eos|pad|unk|sep|cls|mask)_token")
SECRET_VALUE = re.compile(r"[\w.~+/=:-]{8,}")
"""In a file, a text under a SECRET_NAME that may be one: `<image>` is none."""
URL = re.compile(r"\b(?!file:)[A-Za-z][\w+.-]*://[^\s\"'<>,;)\]}]*")
PATH = re.compile(
    r"(?<![\w/.~>)-])(?:~[\w-]*)?(?:/[\w.+@~-]+){2,}|(?<![\w/.])~/[\w.+@-]+"
    r"|\b[A-Za-z]:(?:\\{1,2}|/)(?:[\w.+@ -]{2,}(?:\\{1,2}|/))+[\w.+@-]+"
)
PRIVATE_ROOTS = re.compile(
    r"~|[A-Za-z]:|/(?:Users|root|tmp|mnt|media|nfs|net|gpfs|lustre|scratch\w*|workspace|work|content|kaggle|dbfs|Volumes|"
    r"var/tmp|private)/|(?:/[\w.-]+){0,3}/home/"
)
SYSTEM_ROOTS = ("/bin/", "/boot/", "/dev/", "/etc/", "/lib", "/opt/", "/proc/", "/sbin/", "/sys/", "/usr/", "/var/")
NOBODY = {"", "admin", "jovyan", "nobody", "root", "runner", "ubuntu", "user", "vscode"}
"""User names that say nothing of the person."""
PIECES = {"merges.txt": re.compile(r"#version.*|\S+ \S+|"), "vocab.txt": re.compile(r"\S*")}
"""Vocabularies, and what every line of one is like: pieces of public text, of which any may look like a path."""
OF_ANY_TEXT = ("report.", "tokenizer.json", "chat_template")
"""Files with words of other people, where a name or a path need not be of this machine."""
PLACES = {"logging_dir", "overwrite_output_dir", "resume_from_checkpoint"}


@functools.cache
def key_patterns() -> list[re.Pattern[str]]:
    """Each form of a key that is known."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    classes = {plugin.__name__: plugin for plugin in get_mapping_from_secret_type_to_class().values()}
    return [KEY, *(pattern for name in PLUGINS for pattern in classes[name]().denylist)]


def refuse_leaks(folder: str | Path, public: str = "", names: str = "*") -> None:
    """Looks through every file of a folder but weights and pictures.

    Args:
        folder: what is about to be uploaded.
        public: what is known anyway, such as the repository's name.
        names: a pattern for those that will be.

    Raises:
        ValueError: a secret, a path or the user's name, with file and field.
    """
    leaks = [
        f"{path.name}, {field}: {what}"
        for path in sorted(Path(folder).glob(names))
        if path.is_file() and path.suffix not in (".safetensors", ".png")
        for field, what in _leaks_of(path, None if path.name.startswith(OF_ANY_TEXT) else public)
    ]
    if leaks:
        more = f" And {len(leaks) - 3} more." if len(leaks) > 3 else ""
        raise ValueError(
            f"not uploaded, because what is secret or local would be with it: {'; '.join(leaks[:3])}.{more} "
            "Take it out of the file, or rename what it names."
        )


def find_leak(text: str, public: str | None = "") -> str | None:
    """What in a text must not leave this machine, in words that do not repeat a secret; None if there is nothing.

    The user's name may be part of `public`. With None, for texts of other people, neither it nor paths that do not
    exist here count.
    """
    if _holds_key(text):
        return "a key or token"
    for match in PATH.finditer(URL.sub(" ", text).replace("file://", " ")):
        if os.path.exists(os.path.expanduser(match[0])) and not match[0].startswith(SYSTEM_ROOTS):
            return f"the local path {match[0]}"
        if public is not None and PRIVATE_ROOTS.match(match[0]):
            return f"the local path {match[0]}"
    user = _user()
    is_known = public is None or user in {*NOBODY, *public.split("/")}
    if not is_known and re.search(rf"(?<!\w){re.escape(user)}(?!\w)", text):
        return f"the user name {user}"
    return None


def is_secret(name: str) -> bool:
    """Whether an option or a field of this name holds what nobody else may know: `hub_token`, `X-Api-Key`."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("-", "_")
    return bool(SECRET_NAME.search(name)) and not TOKENIZER_TOKEN.fullmatch(name)


def without_secrets(value: Any) -> Any:
    """Options without those that are secret, also of options within options."""
    if isinstance(value, dict):
        return {name: without_secrets(item) for name, item in value.items() if not is_secret(str(name))}
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def public_value(value: Any) -> Any:
    """An option as others may see it: of a local place its last part, of a server's address the form."""
    if isinstance(value, dict):
        return {
            name: public_value(item) for name, item in value.items() if name not in PLACES and not is_secret(str(name))
        }
    if isinstance(value, list | tuple):
        return [public_value(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.match(r"(?!hf:|file:)[A-Za-z][\w+.-]*://", value):
        return re.sub(r"([\w+.-]+)://[^,\s]*?(/v\d+)?/?(?=[,\s]|$)", r"\1://HOST\2", value)
    place = os.path.expanduser(value.removeprefix("file://"))
    is_place = os.path.isabs(place) or place.startswith("../") or os.path.exists(place)
    if PureWindowsPath(value).anchor and not value.startswith("/"):
        value = PureWindowsPath(value).name
    elif is_place and value.strip("./"):
        value = os.path.basename(os.path.normpath(place))
    return value if find_leak(value) is None else "…"


def public_command(argv: list[str]) -> list[str]:
    """A command line as others may see it."""
    public, hidden = [], False
    for part in argv:
        flag, equals, value = part.partition("=")  # --name=value, or the name=value of some options
        name = flag.lstrip("-")
        if hidden:
            public.append("…")
        elif equals and name.replace("-", "_").isidentifier():
            public.append(f"{flag}={'…' if is_secret(name) else _public_argument(value)}")
        else:
            public.append(_public_argument(part))
        hidden = part.startswith("-") and not equals and is_secret(name)
    return public


def _public_argument(text: str) -> str:
    """A word of a command line, which may be a mapping or a list."""
    if text[:1] not in ("{", "["):
        return str(public_value(text))
    try:
        return json.dumps(public_value(read_yaml(text)), ensure_ascii=False)
    except (ValueError, TypeError):
        return "…"


def _holds_key(text: str) -> bool:
    return any(pattern.search(text) for pattern in key_patterns()) or any(secret in text for secret in _own_secrets())


def _leaks_of(path: Path, public: str | None) -> Iterator[tuple[str, str]]:
    """(where, what) of all leaks in a file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    content = _parsed(path, text)
    if is_vocabulary(path, text, content):
        if _holds_key(text):
            yield "a piece", "a key or token"
        return
    model = content.pop("model", None) if path.name == "tokenizer.json" and isinstance(content, dict) else None
    if _holds_key(json.dumps(model, ensure_ascii=False)):
        yield "model", "a key or token"
    lines = ((f"line {number}", line, False) for number, line in enumerate(text.splitlines(), 1))
    for field, value, is_named_secret in lines if content is None else _strings(content, ""):
        what = "a key or token" if is_named_secret else find_leak(value, public)
        if what is not None:
            yield field, what


def is_vocabulary(path: Path, text: str, content: Any) -> bool:
    """Whether a file is a tokenizer's pieces, by its name and its form."""
    if path.name == "vocab.json":
        return isinstance(content, dict) and all(isinstance(item, int) for item in content.values())
    if path.suffix == ".model":
        return True  # SentencePiece's own bytes
    return path.name in PIECES and all(PIECES[path.name].fullmatch(line) for line in text.split("\n"))


def _parsed(path: Path, text: str) -> Any:
    """What a JSON or YAML file holds; None if it is neither, or broken."""
    try:
        if path.suffix == ".json":
            return json.loads(text)
        return read_yaml(text) if path.suffix in (".yaml", ".yml") else None
    except ValueError:
        return None


def _strings(value: Any, where: str) -> Iterator[tuple[str, str, bool]]:
    """(field, text, whether the field's name says that it is secret) of all texts, names among them."""
    if isinstance(value, str):
        is_named_secret = is_secret(where.rpartition(".")[2]) and bool(SECRET_VALUE.fullmatch(value))
        yield where, value, is_named_secret
    elif isinstance(value, dict):
        for name, item in value.items():
            place = f"{where}.{name}".lstrip(".")
            yield place, str(name), False
            yield from _strings(item, place)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _strings(item, f"{where}[{number}]")


def _own_secrets() -> list[str]:
    """The token in use, and keys in the environment."""
    named = [value for name, value in os.environ.items() if re.search(r"(TOKEN|KEY|SECRET|PASSWORD)$", name)]
    return [secret for secret in (get_token(), *named) if secret and len(secret) > 7]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in the container
        return ""
