"""What must not leave this machine, secrets and local places: found in files, and taken out of options."""

from __future__ import annotations

import functools
import getpass
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import get_token

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
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}|\bAIza[\w-]{35}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\w+://[^/\s:@]+:[^/\s@]+@"
)
"""The commonest forms, which are looked for without detect-secrets too."""
PATH = re.compile(r"(?<![\w:/.~>)-])(?:/[\w.+@~-]+){2,}|\b[A-Za-z]:\\Users\\[\\\w.-]+")
PRIVATE_ROOTS = re.compile(r"^(?:/(?:home|Users|root|tmp|mnt|media|scratch|workspace|var/tmp|private)/|[A-Za-z]:\\)")
SYSTEM_ROOTS = ("/bin/", "/boot/", "/dev/", "/etc/", "/lib", "/opt/", "/proc/", "/sbin/", "/sys/", "/usr/", "/var/")
NOBODY = {"", "admin", "jovyan", "nobody", "root", "runner", "ubuntu", "user", "vscode"}
"""User names that say nothing of the person."""
VOCABULARY = {"tokenizer.json": ("model",), "vocab.json": ("",), "merges.txt": ("",), "vocab.txt": ("",)}
"""Fields that are pieces of public text, of which any may look like a path; "" for all."""
OF_ANY_TEXT = ("report.", "tokenizer.json", "chat_template")
"""Files with words of other people, where a name or a path need not be of this machine."""
PLACES = {"logging_dir", "overwrite_output_dir", "resume_from_checkpoint"}
SECRETS = {"hub_token", "push_to_hub_token", "token", "api_key", "use_auth_token"}


@functools.cache
def key_patterns() -> list[re.Pattern[str]]:
    """Those of detect-secrets. Raises ImportError where it is not installed."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    classes = {plugin.__name__: plugin for plugin in get_mapping_from_secret_type_to_class().values()}
    return [pattern for name in PLUGINS if name in classes for pattern in classes[name]().denylist]


def refuse_leaks(folder: str | Path, public: str = "") -> None:
    """Looks through every text file of a folder.

    Args:
        folder: what is about to be uploaded.
        public: what is known anyway, such as the repository's name.

    Raises:
        ValueError: a secret, a path or the user's name, with file and field.
    """
    leaks = [
        f"{path.name}, {field}: {what}"
        for path in sorted(Path(folder).iterdir())
        if path.suffix in (".json", ".jinja", ".md", ".html", ".yaml", ".txt", ".py")
        for field, text in _fields(path)
        if (what := find_leak(text, None if path.name.startswith(OF_ANY_TEXT) else public)) is not None
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
    try:
        patterns = [KEY, *key_patterns()]
    except ImportError:
        patterns = [KEY]
    if any(pattern.search(text) for pattern in patterns) or any(secret in text for secret in _own_secrets()):
        return "a key or token"
    for match in PATH.finditer(text):
        if os.path.exists(match[0]) and not match[0].startswith(SYSTEM_ROOTS):
            return f"the local path {match[0]}"
        if public is not None and PRIVATE_ROOTS.match(match[0]):
            return f"the local path {match[0]}"
    user = _user()
    is_known = public is None or user in {*NOBODY, *public.split("/")}
    if not is_known and re.search(rf"(?<!\w){re.escape(user)}(?!\w)", text):
        return f"the user name {user}"
    return None


def public_value(value: Any) -> Any:
    """An option as others may see it: of a local place its last part, of a server's address the form."""
    if isinstance(value, dict):
        return {name: public_value(item) for name, item in value.items() if name not in SECRETS | PLACES}
    if isinstance(value, list | tuple):
        return [public_value(item) for item in value]
    if not isinstance(value, str):
        return value
    if urlsplit(value).scheme in ("http", "https"):
        return re.sub(r"(https?)://[^/,]+", r"\1://HOST", value)
    is_place = os.path.isabs(os.path.expanduser(value)) or value.startswith("../") or os.path.exists(value)
    public = os.path.basename(os.path.normpath(value)) if is_place and value.strip("./") else value
    return public if find_leak(public) is None else "…"


def public_command(argv: list[str]) -> list[str]:
    """A command line as others may see it."""
    public, hidden = [], False
    for part in argv:
        flag, equals, value = part.partition("=")  # --name=value, or the name=value of some options
        name = flag.lstrip("-")
        if hidden:
            public.append("…")
        elif equals and name.isidentifier():
            public.append(f"{flag}={'…' if name in SECRETS else public_value(value)}")
        else:
            public.append(str(public_value(part)))
        hidden = part.startswith("--") and not equals and name in SECRETS
    return public


def _fields(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of all texts in a file."""
    left_out = VOCABULARY.get(path.name, ())
    if "" in left_out:
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        content = json.loads(text)
        yield from _strings({name: value for name, value in content.items() if name not in left_out}, "")
    else:
        yield from ((f"line {number}", line) for number, line in enumerate(text.splitlines(), 1))


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for name, item in value.items():
            place = f"{where}.{name}".lstrip(".")
            yield place, str(name)
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
