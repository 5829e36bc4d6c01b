"""URLs of data sets: which are supported, how file names are appended, how they are sent."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote, urlsplit

from bigan.data import DataError
from bigan.urls import is_redacted, redacted, scheme

WEB = ("http", "https")
AZURE = ("az", "azure", "adl", "abfs", "abfss")
OBJECT_STORES = ("s3", "s3a", "gs", *AZURE)
PROGRAMS = ("ais", "ftps", "sftp", "scp", "file")  # read through WebDataset's `gopen`

_UNESCAPED = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SAFE_IN_PATH = "/%:@!$&'()*+,;=~-._"


def join(base: str, name: str) -> str:
    """The URL of file `name` in the folder `base`.

    The name goes before the query of a signed URL, and is percent-encoded where `base` is the
    URL of a web server.
    """
    path, mark, query = base.partition("?") if _has_query(base) else (base, "", "")
    if scheme(base) in (*WEB, "hf"):
        name = quote(name, safe="/:@!$&'()*+,;=~")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def _has_query(url: str) -> bool:
    """Whether "?" begins a query; elsewhere it is a character of a name."""
    return scheme(url) in (*WEB, "hf", *AZURE)


def split_name(url: str) -> tuple[str, str]:
    """The folder of a file and its name, as `join` takes them; ("pipe:...", "") for a command."""
    kind = scheme(url)
    if kind not in (*WEB, *OBJECT_STORES, "hf"):
        return url, ""
    path, mark, query = url.partition("?") if _has_query(url) else (url, "", "")
    base, _, name = path.rpartition("/")
    return f"{base}{mark}{query}", name if kind in OBJECT_STORES else unquote(name)


def encoded(url: str) -> str:
    """A web URL as it is sent: characters that a URL may not contain are percent-encoded.

    What is percent-encoded already stays. "#" is a character of the path or the query.
    """
    head, _, rest = url.partition("://")
    rest, mark, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    authority = authority.encode("idna").decode()
    path = quote(_UNESCAPED.sub("%25", path), safe=_SAFE_IN_PATH)
    query = quote(_UNESCAPED.sub("%25", query), safe=_SAFE_IN_PATH + "?")
    return f"{head.lower()}://{authority}{slash}{path}{mark}{query}"


def without_user(url: str) -> tuple[str, tuple[str, str] | None]:
    """(a web URL without user and password, both of them decoded or None)."""
    head, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if not at:
        return url, None
    name, _, password = user.partition(":")
    return f"{head}://{host}{slash}{path}", (unquote(name), unquote(password))


def of_hugging_face(url: str) -> str:
    """The web URL of hf://datasets/OWNER/NAME[@REVISION]/PATH; raises `DataError`."""
    found = re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)(?:@([^/]+))?/?(.*)", url)
    if not found:
        raise DataError(f"{redacted(url)}: is not of the form hf://datasets/OWNER/NAME/FOLDER")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    revision = found[2] or "main"
    return f"{endpoint}/datasets/{found[1]}/resolve/{revision}/{found[3]}"


def check_url(url: str, allow_pipe: bool) -> None:
    """Raise `DataError` for a URL that cannot be read, or that would run a disallowed command."""
    kind = scheme(url)
    if is_redacted(url):
        raise DataError(
            f"{redacted(url)}: credentials are not stored with a run; give the complete URL, "
            "data.path=URL"
        )
    if kind == "pipe":
        if not allow_pipe:
            raise DataError(
                f"{redacted(url)}: runs a shell command; if you trust it, set data.allow_pipe=true"
            )
        return
    if kind in PROGRAMS:
        if os.environ.get("GOPEN_REWRITE") and not allow_pipe:
            raise DataError(
                f"{redacted(url)}: the variable GOPEN_REWRITE could turn it into a shell command; "
                "unset it, or set data.allow_pipe=true"
            )
        return
    if kind not in (*WEB, *OBJECT_STORES, "hf"):
        raise DataError(f"{redacted(url)}: unsupported URL scheme; use https://, s3:// or a folder")
    if kind == "hf":
        of_hugging_face(url)
    elif not is_valid(url):
        raise DataError(
            f"{redacted(url)}: has no valid name of a server or a bucket, or no valid port; "
            "percent-encode special characters in a user or password"
        )


def is_valid(url: str) -> bool:
    """Whether a URL has a valid name of a server or bucket, and a valid port, if any."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        if scheme(url) in WEB:
            host.encode("idna")
        return bool(host) and not re.search(r"\s", host) and parts.port != 0
    except ValueError:
        return False
