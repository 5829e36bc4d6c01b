"""Responses of a store: transient and permanent failures, web pages, and content encodings."""

from __future__ import annotations

import contextlib
import email.utils
import re
import time
import zlib
from typing import Any
from urllib.parse import unquote

from bigan.data import DataError
from bigan.data.format import compression
from bigan.data.stores.outages import TransientError, WrongContentError

TIMEOUT_SECONDS = 20  # without a byte, after which a request has failed
CHUNK_BYTES = 2**20
TOO_MANY = (408, 425, 429)
STORAGE_FULL = 507
LASTING = (501, 505, STORAGE_FULL)
TRANSIENT = ("RequestTimeout", "SlowDown", "Throttling", "OperationAborted",
             "ConditionalRequestConflict")  # fmt: skip
Range = tuple[int, int]


class RangesIgnoredError(Exception):
    """The server answers a request for a range with the complete file, or with a compressed one."""


def refuse(status: int, body: str, where: str, retry_after_seconds: float) -> None:
    """Raise for an answer with an error status; `body` is its beginning."""
    code = re.search(r"<Code>(\w+)</Code>", body)
    reason = f"status {status}" + (f", {code[1]}" if code else "")
    if status == 404 or (code and code[1] == "NoSuchKey"):
        raise FileNotFoundError(where)
    if status == 416:
        raise WrongContentError("it ends before the range that was asked for")
    transient = code and code[1] in TRANSIENT
    is_full = status == STORAGE_FULL or (code and "Quota" in code[1])
    if transient or status in TOO_MANY or (status >= 500 and status not in LASTING):
        raise TransientError(reason, retry_after_seconds)
    if re.search(r"ExpiredToken|[Ee]xpired", body):
        hint = "its signature or token has expired; give one that is valid now"
    elif "RequestTimeTooSkewed" in body:
        hint = "the clock of this machine is wrong"
    elif is_full:
        hint = "the store is full, or a quota is used up"
    elif status in (401, 403, 407):
        hint = "check the credentials and their permissions"
    elif status in (301, 307, 308):
        hint = "the bucket is at another endpoint; set AWS_REGION or AWS_ENDPOINT_URL"
    else:
        hint = "check the URL"
    raise DataError(f"{where}: the store refuses the request ({reason}); {hint}")


def is_html(data: bytes) -> bool:
    """Whether the bytes are the beginning of a web page."""
    return (
        data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html"))
    )


def not_a_page(where: str) -> str:
    """The message for a web page in place of a file."""
    return (
        f"{where}: the response is a web page, such as a login page, not the file; check the URL "
        "and its credentials"
    )


def retry_after(value: str | None) -> float:
    """The seconds of a Retry-After header, which is a number or a date; 0 without one."""
    if not value:
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def decoder(encoding: str, name: str, where: str) -> Any:
    """A function that undoes the Content-Encoding of a transfer, chunk by chunk.

    Some servers declare the compression of a .tar.gz file itself in this header; it stays.
    """
    if encoding in ("identity", "") or compression.by_name(unquote(name)):
        return bytes
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise DataError(
            f"{where}: the server compresses it with {encoding!r}; only gzip and deflate are "
            "supported"
        )
    decompress = zlib.decompressobj(wbits=47 if encoding != "deflate" else zlib.MAX_WBITS)

    def decode(chunk: bytes) -> bytes:
        try:
            return decompress.decompress(chunk)
        except zlib.error:
            raise WrongContentError("its compression is damaged") from None

    return decode
