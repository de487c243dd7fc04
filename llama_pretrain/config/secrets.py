"""What a secret looks like, so that none is written to a file: by its name, its form, its value.

A config never needs one: it holds at most the name of an environment variable.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_pretrain.config.problems import Problem

REDACTED = "[redacted]"
MIN_LENGTH = 8
"""Shorter values of environment variables are not searched for: `TOKEN=1` is everywhere."""

_ANYWHERE = re.compile(r"password|passwd|passphrase|secret|credential", re.IGNORECASE)
_NAME = re.compile(
    r"(?:password|passwd|passphrase|secret|credentials?|"
    r"(?:api|access|private|account|signing|encryption|storage|ssh|gpg|auth)[_\-]?key(?:[_\-]id)?|"
    r"token|(?:^|[_.\-])(?:pwd|pass|pat|authorization|cookie|dsn))$",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(
    r"(?:^|[_.\-])(?:bos|eos|pad|unk|sep|cls|mask|special|added|prompt|next|last|first|per)_?token$",
    re.IGNORECASE,
)
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"
    r"|\bsk-[A-Za-z0-9_\-]{16,}"
    r"|\bsk_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{20,}"
    r"|\bglpat-[A-Za-z0-9_\-]{16,}"
    r"|\bxox[abeoprs]-[A-Za-z0-9\-]{10,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bAIza[A-Za-z0-9_\-]{35}"
    r"|\beyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:.*?-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|.*\Z)"
    r"|\b(?:Bearer|Basic) +[A-Za-z0-9_\-.=+/~]{16,}"
    r"|\bya29\.[A-Za-z0-9_\-]{16,}"
    r"|\bSG\.[A-Za-z0-9_\-]{16,}\.[A-Za-z0-9_\-]{16,}"
    r"|\bAGE-SECRET-KEY-[A-Z0-9]{16,}"
    r"|(?<=[?&])(?:sig|X-Amz-Signature|X-Amz-Credential|X-Goog-Signature)=[^\s&\"']{8,}",
    re.DOTALL,
)
_URL = re.compile(r"(?<=://)(?:[^\s/@:'\"]*:[^\s/@'\"]+|[A-Za-z0-9_\-]{20,})(?=@)")
_OPTION = re.compile(r"(?P<option>--?[A-Za-z][\w\-]*)(?P<space>[ \t]+)(?P<value>[^\s\-][^\s]*)")
_NETRC = re.compile(r"(?P<before>\bmachine\s+\S+\s+login\s+\S+\s+password\s+)\S+")
_SETTING = re.compile(
    r"""(?<![\w.\-])(?P<key>[A-Za-z_][\w.\-]{0,99}+)(?P<mid>["']?[ \t]*[=:][ \t]*)"""
    r"""(?P<value>"[^"\n]{4,}"|'[^'\n]{4,}'|[^\s"',;{}\[\]()<>]{6,}+(?![(\[]))"""
)
_WORDS = re.compile(r"[A-Za-z_.]+")
_PLAIN = re.compile(r"(?:true|false|null|none|\$\{.*|os\..*|<.*)", re.IGNORECASE)
_COUNT = re.compile(r"[-+]?[\d_]+(?:\.\d*)?")
_FILE = re.compile(
    r"(?:\.env(?:\..*)?|.*\.(?:env|pem|key|p12|pfx|jks|keystore|ppk|kdbx|gpg|asc|age)(?:\..*)?|"
    r"[._]?netrc(?:\..*)?|\.pgpass|\.npmrc|\.pypirc|\.git-credentials|\.htpasswd|\.s3cfg|"
    r".*\.tfstate(?:\..*)?|kube_?config(?:\..*)?|rclone\.conf|id_(?:rsa|dsa|ecdsa|ed25519).*|"
    r".*(?:credential|secret|passw|private[_\-]?key|api[_\-]?key|token\.).*|token|.*[_\-.]key)",
    re.IGNORECASE,
)
_FOLDERS = {".ssh", ".aws", ".gnupg", ".azure", ".kube", ".docker", "secrets"}


def is_secret_name(name: str) -> bool:
    """Whether a setting or an environment variable of this name would hold a secret."""
    parts = [part for part in name.split(".") if not part.isdecimal()]
    last = parts[-1] if parts else name  # of a setting's dotted path, or of a list in it
    return _ANYWHERE.search(last) is not None or _ends_as_secret(last)


def _ends_as_secret(name: str) -> bool:
    return _NAME.search(name) is not None and _NO_SECRET.search(name) is None


def _is_plain(name: str, value: str) -> bool:
    """Whether a value is not secret although its name suggests so."""
    if _PLAIN.fullmatch(value):
        return True
    # Tokens of text are usually no secrets: `token = first_token`, `num_token: 128000`.
    return name.lower().endswith("token") and _COUNT.fullmatch(value) is not None


def _names_secret(name: str, value: str) -> bool:
    return is_secret_name(name) and len(value) >= 6 and not _is_plain(name, value)


def is_secret_file(path: str) -> bool:
    """Whether a file of this name is likely to hold secrets."""
    parts = Path(path).parts
    name = parts[-1] if parts else ""
    if name.endswith((".py", ".md")):  # code and prose about secrets; their lines are redacted
        return False
    return not _FOLDERS.isdisjoint(parts) or _FILE.fullmatch(name) is not None


def known_secrets(environment: Mapping[str, str] | None = None) -> list[str]:
    """The values of environment variables whose names suggest secrets, longest first.

    Args:
        environment: `None` = this process's.
    """
    variables = os.environ if environment is None else environment
    found = {
        value
        for name, value in variables.items()
        if is_secret_name(name) and name != "PWD" and len(value) >= MIN_LENGTH
        if not os.path.exists(value)
    }
    return sorted(found, key=len, reverse=True)


def redact(text: str, *, known: Iterable[str] | None = None) -> str:
    """The text without what looks like a secret.

    Args:
        known: values that are secrets whatever they look like; `None` = those of the environment.
    """
    for value in known_secrets() if known is None else known:
        text = text.replace(value, REDACTED)
    text = _FORMS.sub(REDACTED, text)
    text = _URL.sub(REDACTED, text)
    text = _NETRC.sub(rf"\g<before>{REDACTED}", text)
    text = _OPTION.sub(_redact_option, text)
    return _SETTING.sub(_redact_setting, text)


def _redact_option(match: re.Match[str]) -> str:
    """`--password x`, but not `--max-token 5`."""
    name = match["option"].lstrip("-").replace("-", "_")
    if not _ends_as_secret(name) or _is_plain(name, match["value"]):
        return match[0]
    return f"{match['option']}{match['space']}{REDACTED}"


def _redact_setting(match: re.Match[str]) -> str:
    name, value = match["key"], match["value"]
    if not _ends_as_secret(name) or _is_plain(name, value.strip("'\"")):
        return match[0]
    if name.lower().endswith("token") and _WORDS.fullmatch(value):
        return match[0]
    return f"{match['key']}{match['mid']}{REDACTED}"


def redact_values(values: Any, *, known: Iterable[str]) -> Any:
    """Plain nested values without what looks like a secret."""
    if isinstance(values, dict):
        return {
            key: REDACTED
            if isinstance(item, str) and is_secret_name(str(key)) and not _is_plain(str(key), item)
            else redact_values(item, known=known)
            for key, item in values.items()
        }
    if isinstance(values, list):
        return [redact_values(item, known=known) for item in values]
    return redact(values, known=known) if isinstance(values, str) else values


def find_secrets(values: Any, path: str = "", known: list[str] | None = None) -> Iterator[str]:
    """Paths of plain nested values that look like secrets; the value is never named."""
    known = known_secrets() if known is None else known
    if isinstance(values, dict | list):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        for key, inner in pairs:
            yield from find_secrets(inner, f"{path}.{key}" if path else str(key), known)
    elif isinstance(values, str) and (
        _names_secret(path, values) or redact(values, known=known) != values
    ):
        yield path


def secret_problem(path: str) -> Problem:
    """A place that looks like it holds a secret, without the value."""
    return Problem(
        path=path,
        message="looks like a secret, and would be written to the run's files",
        hint="Remove it: libraries read secrets from the environment or their own login",
    )


def find_secret_words(words: Iterable[str]) -> Iterator[Problem]:
    """Words of a command line that would write a secret to files: Hydra records them."""
    known = known_secrets()
    for word in words:
        key, equals, value = word.lstrip("+~").partition("=")
        if (equals and _names_secret(key, value)) or redact(word, known=known) != word:
            safe = redact(key, known=known) == key
            yield secret_problem(key if equals and safe else "command line")


def find_secret_files(folders: Iterable[Path]) -> Iterator[Problem]:
    """YAML files of a config that hold a secret: Hydra writes a sweep's config before any check."""
    known = known_secrets()
    for folder in folders:
        for file in sorted(folder.rglob("*.yaml")):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # Hydra reports it if it is chosen
            if redact(text, known=known) != text:
                yield secret_problem(str(file))


def read_environment(name: str, *default: Any) -> str | None:
    """The resolver `oc.env`, which refuses variables that look like secrets.

    It sees the name after everything inside it has been resolved, so nesting cannot bypass it, and
    it applies to Hydra's own settings too, such as the run directory.

    Raises:
        ValueError: if the variable is a secret by its name or its value.
        KeyError: if it is not set and there is no default.
    """
    value = os.environ.get(name)
    if is_secret_name(name) or (value is not None and redact(value) != value):
        raise ValueError(f"the environment variable {name} looks like a secret and is not read")
    if value is not None:
        return value
    if default:
        return None if default[0] is None else str(default[0])
    raise KeyError(f"the environment variable {name} is not set")
