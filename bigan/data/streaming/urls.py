"""URLs of data sets: which are supported, how file names are appended, how they are displayed."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote, urlsplit

from bigan.data import DataError

WEB = ("http", "https")
OBJECT_STORES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")
PROGRAMS = ("ais", "ftps", "sftp", "scp", "file")  # read through WebDataset's `gopen`

_UNESCAPED = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SECRET_ARGUMENT = re.compile(
    r"((?:(?<=\s)-u|--user|authorization:|\w*(?:key|secret|token|password)\w*\s*[=:])\s*)"
    r"(?:(?:bearer|basic)\s+)?[^\s'\"]+",
    re.IGNORECASE,
)
_SAFE_IN_PATH = "/%:@!$&'()*+,;=~-._"


def is_remote(path: str) -> bool:
    """Whether `path` is a URL, not a path in the file system."""
    return "://" in path or path.startswith("pipe:")


def scheme(url: str) -> str:
    """The scheme of a URL in lower case, "pipe" for a command."""
    return "pipe" if url.startswith("pipe:") else url.partition("://")[0].lower()


def shown(url: str) -> str:
    """The URL without user, password and the values of its query, for messages, logs and files.

    A path in the file system is returned unchanged.
    """
    if url.startswith("pipe:"):
        command = re.sub(r"[a-zA-Z][\w+.-]*://[^\s'\"]+", lambda found: shown(found[0]), url)
        return _SECRET_ARGUMENT.sub(r"\1***", command)
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
    """Whether credentials of the URL were removed by `shown`."""
    return is_remote(url) and bool(re.search(r"://\*\*\*@|[?&][^=&]*=\*\*\*(?=$|[&\s'\"])", url))


def join(base: str, name: str) -> str:
    """The URL of file `name` in the folder `base`.

    The name goes before the query of a signed URL, and is percent-encoded where `base` is an
    address of the web.
    """
    path, mark, query = base.partition("?") if scheme(base) != "pipe" else (base, "", "")
    if scheme(base) in (*WEB, "hf"):
        name = quote(name, safe="/:@!$&'()*+,;=~")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def split_name(url: str) -> tuple[str, str]:
    """The folder of a file and its name, as `join` takes them; ("pipe:...", "") for a command."""
    kind = scheme(url)
    if kind not in (*WEB, *OBJECT_STORES, "hf"):
        return url, ""
    path, mark, query = url.partition("?")
    base, _, name = path.rpartition("/")
    return f"{base}{mark}{query}", name if kind in OBJECT_STORES else unquote(name)


def encoded(url: str) -> str:
    """A web address as it is sent: characters that a URL may not contain are percent-encoded.

    What is percent-encoded already stays. "#" is a character of the path or the query.
    """
    head, _, rest = url.partition("://")
    rest, mark, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    path = quote(_UNESCAPED.sub("%25", path), safe=_SAFE_IN_PATH)
    query = quote(_UNESCAPED.sub("%25", query), safe=_SAFE_IN_PATH + "?")
    return f"{head.lower()}://{authority}{slash}{path}{mark}{query}"


def without_user(url: str) -> tuple[str, tuple[str, str] | None]:
    """A web address without its user and password, and those decoded, or None."""
    head, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if not at:
        return url, None
    name, _, password = user.partition(":")
    return f"{head}://{host}{slash}{path}", (unquote(name), unquote(password))


def of_hugging_face(url: str) -> str:
    """The web address of hf://datasets/OWNER/NAME[@REVISION]/PATH; raises `DataError`."""
    found = re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)(?:@([^/]+))?/?(.*)", url)
    if not found:
        raise DataError(f"{shown(url)}: is not of the form hf://datasets/OWNER/NAME/FOLDER")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    revision = found[2] or "main"
    return f"{endpoint}/datasets/{found[1]}/resolve/{revision}/{found[3]}"


def check_url(url: str, allow_pipe: bool) -> None:
    """Raise `DataError` for a URL that cannot be read, or that would run a disallowed command."""
    kind = scheme(url)
    if is_redacted(url):
        raise DataError(
            f"{shown(url)}: the credentials of this address are not stored with a run; give the "
            "complete address"
        )
    if kind == "pipe":
        if not allow_pipe:
            raise DataError(
                f"{shown(url)}: runs a shell command; if you trust it, set data.allow_pipe=true"
            )
        return
    if kind in PROGRAMS:
        if os.environ.get("GOPEN_REWRITE") and not allow_pipe:
            raise DataError(
                f"{shown(url)}: the variable GOPEN_REWRITE could turn it into a shell command; "
                "unset it, or set data.allow_pipe=true"
            )
        return
    if kind not in (*WEB, *OBJECT_STORES, "hf"):
        raise DataError(f"{shown(url)}: unsupported URL scheme; use https://, s3:// or a folder")
    if kind == "hf":
        of_hugging_face(url)
    elif not urlsplit(url).netloc.rpartition("@")[2]:
        raise DataError(f"{shown(url)}: has no name of a server or a bucket")
