"""Options of `obstore` that follow from the environment and the files of the user.

`obstore` reads the environment itself (AWS_*, GOOGLE_*, AZURE_*), but not ~/.aws. Without
credentials it asks the metadata service of a cloud machine, which takes minutes elsewhere;
therefore they are looked for here first.
"""

from __future__ import annotations

import configparser
import os
from pathlib import Path
from typing import Any

from bigan.data import DataError
from bigan.data.stores.urls import WEB, is_valid
from bigan.urls import redacted, scheme

_TRUE = ("1", "true", "t", "yes", "y", "on")


def client_options(timeout_seconds: int) -> dict[str, Any]:
    """Time-outs, and plain HTTP where an endpoint is given with it.

    Raises `DataError` for an endpoint that is not a URL, for which `obstore` panics.
    """
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_ENDPOINT",
             "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")  # fmt: skip
    endpoints = {name: value for name in names if (value := os.environ.get(name))}
    for name, value in endpoints.items():
        if scheme(value) not in WEB or not is_valid(value):
            raise DataError(f"{name}: {redacted(value)}: is not a URL; use https://HOST")
    plain = any(scheme(value) == "http" for value in endpoints.values())
    return {
        "allow_http": plain or _is_set("AZURE_STORAGE_USE_EMULATOR"),
        "connect_timeout": f"{timeout_seconds}s",
        "read_timeout": f"{timeout_seconds}s",
        "timeout": "1day",  # of a complete transfer; `read_timeout` ends one without progress
    }


def store_options(kind: str, base: str) -> dict[str, Any]:
    """The options of a store beyond what `obstore` takes from the environment.

    Raises `DataError` if there are no credentials.
    """
    if kind in ("s3", "s3a"):
        return _s3(base)
    if kind == "gs":
        return _google(base)
    return _azure(base)


def _s3(base: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    profile = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    section = _aws_section(profile)
    if not _any("AWS_REGION", "AWS_DEFAULT_REGION") and "region" in section:
        options["region"] = section["region"]
    given = _any("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
                 "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_METADATA_ENDPOINT")  # fmt: skip
    keys = os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY")
    if keys or given or _is_set("AWS_SKIP_SIGNATURE"):
        return options
    if section:
        return options | _aws_profile(profile, section, base)
    if _machine("sys_vendor", "Amazon EC2") and not _is_set("AWS_EC2_METADATA_DISABLED"):
        return options  # the role of the machine
    raise DataError(
        f"{redacted(base)}: no credentials for S3; set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or AWS_SKIP_SIGNATURE=true for a public bucket"
    )


def _aws_section(profile: str) -> dict[str, str]:
    """The settings of a profile in ~/.aws/credentials and ~/.aws/config."""
    found: dict[str, str] = {}
    home = Path.home() / ".aws"
    for variable, name, section in (
        ("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile),
    ):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(Path(os.environ.get(variable) or home / name).expanduser())
        except (configparser.Error, UnicodeDecodeError):
            continue
        if parser.has_section(section):
            found |= dict(parser.items(section))
    return found


def _aws_profile(profile: str, section: dict[str, str], base: str) -> dict[str, Any]:
    """The keys of a profile; botocore, where it is installed, also reads SSO and roles."""
    if {"aws_access_key_id", "aws_secret_access_key"} <= set(section):
        keys = {
            "access_key_id": section["aws_access_key_id"],
            "secret_access_key": section["aws_secret_access_key"],
        }
        token = section.get("aws_session_token")
        return keys | ({"session_token": token} if token else {})
    try:
        import botocore.session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise DataError(
            f"{redacted(base)}: the AWS profile {profile!r} has no static keys; install boto3, "
            "which reads its roles and SSO"
        ) from None
    session = botocore.session.Session(profile=profile)
    session.get_component("credential_provider").remove("iam-role")  # asks the machine
    try:
        return {"credential_provider": Boto3CredentialProvider(session)}
    except Exception as error:
        raise DataError(
            f"{redacted(base)}: no credentials from the AWS profile {profile!r} ({error})"
        ) from None


def _google(base: str) -> dict[str, Any]:
    well_known = Path.home() / ".config" / "gcloud" / "application_default_credentials.json"
    names = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_BEARER_TOKEN",
             "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_SERVICE_ACCOUNT_KEY")  # fmt: skip
    known = _any(*names) or well_known.is_file() or _is_set("GOOGLE_SKIP_SIGNATURE")
    if known or _machine("product_name", "Google Compute Engine"):
        return {}
    raise DataError(
        f"{redacted(base)}: no credentials for Google Cloud Storage; set "
        "GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket"
    )


def _azure(base: str) -> dict[str, Any]:
    options = {}
    token = base.partition("?")[2]
    if token:
        options["sas_key"] = token
    names = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_SAS_KEY",
             "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_TOKEN", "AZURE_CLIENT_SECRET",
             "AZURE_STORAGE_CLIENT_SECRET", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_MSI_ENDPOINT",
             "AZURE_IDENTITY_ENDPOINT", "IDENTITY_ENDPOINT")  # fmt: skip
    flags = ("AZURE_SKIP_SIGNATURE", "AZURE_USE_AZURE_CLI", "AZURE_STORAGE_USE_EMULATOR")
    known = token or _any(*names) or any(map(_is_set, flags))
    if known or _machine("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"):
        return options
    raise DataError(
        f"{redacted(base)}: no credentials for Azure; set AZURE_STORAGE_ACCOUNT_NAME and "
        "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true"
    )


def _any(*names: str) -> bool:
    return any(os.environ.get(name) for name in names)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in _TRUE


def _machine(field: str, value: str) -> bool:
    """Whether this machine is of a cloud, from its firmware."""
    try:
        return Path("/sys/class/dmi/id", field).read_text().strip() == value
    except OSError:
        return False
