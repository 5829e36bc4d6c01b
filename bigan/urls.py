"""URLs as they are displayed and stored: without credentials."""

from __future__ import annotations

import re

_NAMES = r"(?:authorization|bearer|cookie|credential|key|passw|secret|signature|token)"
_SECRET_ARGUMENT = re.compile(
    # -u NAME:PASSWORD, --password SECRET, TOKEN=SECRET, 'Cookie: SECRET; SECRET'
    r"((?:(?<=\s)-u|--[\w-]*(?:user|" + _NAMES + r")[\w-]*[\s=]|sshpass\s+-p)\s*|"
    r"[\w-]*" + _NAMES + r"[\w-]*\s*=\s*)"
    r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"]+)"
    r"|([\w-]*" + _NAMES + r"[\w-]*\s*:\s*)[^'\"]+",
    re.IGNORECASE,
)
# A user and a password with a "/" or "?" that should be percent-encoded.
_UNENCODED_USER = re.compile(r"[^/?@\[\]]*:(?!\d*(?:[/?]|$))[^@\s]*@.*")


def is_remote(path: str) -> bool:
    """Whether `path` is a URL, not a path in the file system."""
    return "://" in path or path.startswith("pipe:")


def redacted_text(text: str) -> str:
    """A text without the credentials of the URLs and commands in it.

    A URL may have lost a "/", as in a `Path`. Punctuation at its end belongs to the text.
    """
    text = re.sub(
        r"([a-zA-Z][\w+.-]*:/)(/?)([^\s'\"]*[^\s'\",.;:)\]}])",
        lambda found: redacted(f"{found[1]}/{found[3]}").replace("://", f":/{found[2]}", 1),
        text,
    )
    return re.sub(r"\bpipe:.*", lambda found: _without_arguments(found[0]), text)


def scheme(url: str) -> str:
    """The scheme of a URL in lower case, "pipe" for a command."""
    return "pipe" if url.startswith("pipe:") else url.partition("://")[0].lower()


def redacted(url: str) -> str:
    """The URL without user, password and the values of its query, for messages, logs and files.

    A path in the file system is returned unchanged.
    """
    if url.startswith("pipe:"):
        return redacted_text(url)
    head, separator, rest = url.partition("://")
    if not separator:
        return url
    if _UNENCODED_USER.fullmatch(rest):
        rest = f"***@{rest.rpartition('@')[2]}"
    rest, mark, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if at and scheme(url) not in ("abfs", "abfss"):  # there it is the container
        authority = f"***@{host}"
    elif at:
        authority = f"{user.partition(':')[0]}@{host}"
    if query:
        parts = [part.partition("=") for part in query.split("&")]
        query = "&".join(f"{name}=***" if equals else "***" for name, equals, _ in parts)
    return f"{head}://{authority}{slash}{path}{mark}{query}"


def is_redacted(url: str) -> bool:
    """Whether credentials of the URL were removed by `redacted`."""
    return is_remote(url) and "***" in url


def _without_arguments(command: str) -> str:
    return _SECRET_ARGUMENT.sub(lambda found: f"{found[1] or found[2]}***", command)
