"""URLs as they are displayed and stored: without credentials."""

from __future__ import annotations

import re

_SECRET_ARGUMENT = re.compile(
    r"((?:(?<=\s)-u|--user|authorization:|\w*(?:key|secret|token|password)\w*\s*[=:])\s*)"
    r"(?:(?:bearer|basic)\s+)?[^\s'\"]+",
    re.IGNORECASE,
)


def is_remote(path: str) -> bool:
    """Whether `path` is a URL, not a path in the file system."""
    return "://" in path or path.startswith("pipe:")


def redacted_text(text: str) -> str:
    """A text without the credentials of the URLs in it."""
    return re.sub(r"[a-zA-Z][\w+.-]*://[^\s'\"]+", lambda found: redacted(found[0]), text)


def scheme(url: str) -> str:
    """The scheme of a URL in lower case, "pipe" for a command."""
    return "pipe" if url.startswith("pipe:") else url.partition("://")[0].lower()


def redacted(url: str) -> str:
    """The URL without user, password and the values of its query, for messages, logs and files.

    A path in the file system is returned unchanged.
    """
    if url.startswith("pipe:"):
        return _SECRET_ARGUMENT.sub(r"\1***", redacted_text(url))
    head, separator, rest = url.partition("://")
    if not separator:
        return url
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
    """Whether `redacted` has removed credentials from the URL."""
    return is_remote(url) and bool(re.search(r"://\*\*\*@|[?&][^=&]*=\*\*\*(?=$|[&\s'\"])", url))
