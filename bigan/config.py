"""Strict YAML plus `a.b=value` overrides into frozen pydantic models.

Every problem is a `ConfigError` of one line: file (or command line), key path, value, and what is
expected or the nearest valid key. The settings themselves are declared in `run_config.py` and in
the packages that use them.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from bigan.errors import UserError
from bigan.urls import redacted_text

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

CREDENTIALS = {"credentials": True}  # context of `model_dump`: keeps them


class ConfigError(UserError):
    """A config that cannot be used; the message is one line."""

    everywhere = True


class Frozen(BaseModel):
    """Base of every config section: immutable, no unknown keys, no implicit type conversion.

    In files and on the command line, an integer may have another notation: 1e6, 1_000_000, "2.5e5".
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False
    )


M = TypeVar("M", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number (YAML 1.2) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be plain text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 parses 2020-01-01 as a date; here it stays a string, which JSON can represent.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; `where` is its name in error messages."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None


def load(
    schema: type[M],
    path: Path | str,
    overrides: Sequence[str] = (),
    complete: Callable[[dict[str, Any], str], dict[str, Any]] | None = None,
) -> M:
    """Read `path`, apply `overrides` ("a.b=value", the value in YAML) and validate.

    `complete` fills in defaults before the validation: (content, file) -> content.

    Raises `ConfigError` for an unreadable file, an unknown key or a value of the wrong type.
    """
    data, touched = read(path, overrides)
    if complete is not None:
        data = complete(data, str(path))
    return validate(schema, data, str(path), touched)


def read(path: Path | str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """(content of a YAML file with `overrides` applied, their key paths); not validated."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the config: {error.strerror}{_nearest_file(path)}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; expected a YAML config") from None
    data = parse_yaml(text, str(path)) or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return data, [_apply_override(data, override) for override in overrides]


def validate(schema: type[M], data: dict[str, Any], where: str, touched: Iterable[str] = ()) -> M:
    """Validate plain data; `touched` are the key paths set on the command line."""
    data = _with_integers([schema], [], data)
    try:
        # In JSON mode, strict validation accepts a list for a tuple and a str for a Path.
        return schema.model_validate_json(json.dumps(data))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{where}: a value is not a plain number, text or list") from None
        # Unknown keys first: a misspelled key is the cause of a missing one.
        details = sorted(error.errors(), key=lambda d: d["type"] != "extra_forbidden")
        line = _explain(schema, data, details[0], where, list(touched))
        rest = f" (and {len(details) - 1} more problem(s))" if len(details) > 1 else ""
        raise ConfigError(line + rest) from None


def dump(config: BaseModel, context: Mapping[str, bool] | None = None) -> str:
    """The YAML text of a config, for `load`; URLs are complete with the context `CREDENTIALS`."""
    plain = config.model_dump(mode="json", context=context)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key path, old value, new value) for every leaf in which two plain mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            found
            for key in keys
            for found in differences(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    return [] if old == new else [(prefix.rstrip("."), old, new)]


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key path, value) for every leaf of a plain mapping, in order: ("train.seed", 0)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _apply_override(data: dict[str, Any], override: str) -> str:
    key, equals, text = override.partition("=")
    key, override = key.strip(), redacted_text(override)  # for messages
    parts = key.split(".")
    if equals and parts[0].isidentifier() and any(part.isdecimal() for part in parts[1:]):
        section = ".".join(itertools.takewhile(str.isidentifier, parts))
        raise ConfigError(
            f"command line: {override!r}: an item of a list cannot be set by its number; give the "
            f"whole list, {section}=[...]"
        )
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(
            f"command line: {override!r} is not an override; write key.path=value, "
            "for example train.seed=1"
        )
    *parents, leaf = key.split(".")
    node = data
    for depth, part in enumerate(parents):
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            above = ".".join(parents[: depth + 1])
            raise ConfigError(f"command line: {override}: {above} is a value, not a section")
        node = child
    node[leaf] = parse_yaml(text, f"command line: {override}")
    return key


def _explain(
    schema: type[BaseModel],
    data: dict[str, Any],
    detail: ErrorDetails,
    path: str,
    touched: list[str],
) -> str:
    loc = _without_tags(data, detail["loc"])
    key = ".".join(str(part) for part in loc)
    from_command_line = any(
        f"{key}.".startswith(f"{t}.") or t.startswith(f"{key}.") for t in touched
    )
    where = "command line" if from_command_line else path
    if detail["type"] == "extra_forbidden":
        candidates = _keys(schema, data)
        if key in candidates:  # of another class of a tagged union
            section, _, leaf = key.rpartition(".")
            name = _at(data, loc[:-1]).get("name", "the default")
            chosen = "command line" if f"{section}.name" in touched else where
            return (
                f"{chosen}: {section}.name = {name}: has no setting {leaf}; leave {key} = "
                f"{redacted_text(repr(detail['input']))} out"
            )
        hint = _nearest_key(key, candidates)
        return f"{where}: {key} = {redacted_text(repr(detail['input']))}: unknown key{hint}"
    if detail["type"] == "missing":
        return f"{where}: {key}: this key is required and missing"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return f"{where}: {message}"
    if detail["type"] in {"literal_error", "union_tag_invalid"}:
        context = detail.get("ctx", {})
        expected = str(context.get("expected") or context.get("expected_tags") or "")
        options = re.findall(r"'([^']*)'", expected)
        if detail["type"] == "union_tag_invalid":
            key = f"{key}.name"
            value = context.get("tag")
        else:
            value = detail["input"]
        close = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{where}: {key} = {redacted_text(repr(value))}: expected one of {expected}{hint}"
    value = detail["input"]
    shown = f" = {redacted_text(repr(value))}" if not isinstance(value, dict) else ""
    return f"{where}: {key}{shown}: {message}"


def _without_tags(data: Any, loc: Sequence[int | str]) -> list[int | str]:
    """`loc` without the union tags ("biggan") and constraint markers that pydantic inserts."""
    kept: list[int | str] = []
    node: Any = data
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(node, dict):
            if part not in node and not last:
                continue
            if part not in node and node.get("name") == part:
                continue
            node = node.get(str(part))
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif not last:
            continue
        elif isinstance(part, str) and kept and not isinstance(node, dict | list):
            continue  # the name of a union member after a scalar
        kept.append(part)
    return kept


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated, tuple, list):
        return [model for arg in typing.get_args(annotation) for model in _models_in(arg)]
    return []


def _entries_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that are the values of a mapping: those of `dict[str, Model]`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict:
        return _models_in(arguments[1])
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return [model for arg in arguments for model in _entries_in(arg)]
    return []


def _keys(schema: type[BaseModel], data: Any, prefix: str = "") -> list[str]:
    """Every key path of a schema, including those of all union members.

    Below a mapping: for the keys that `data`, the content that is validated, has there.
    """
    paths: list[str] = []
    for name, info in schema.model_fields.items():
        paths.append(prefix + name)
        below = data.get(name) if isinstance(data, dict) else None
        for model in _models_in(info.annotation):
            paths += _keys(model, below, f"{prefix}{name}.")
        for model in _entries_in(info.annotation):
            for key, entry in below.items() if isinstance(below, dict) else ():
                paths += _keys(model, entry, f"{prefix}{name}.{key}.")
    return list(dict.fromkeys(paths))


def _at(data: Any, loc: Sequence[int | str]) -> dict[str, Any]:
    """The mapping at a location of plain data, or an empty one."""
    for part in loc:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return {}
    return data if isinstance(data, dict) else {}


def _nearest_key(key: str, candidates: list[str]) -> str:
    parent, _, leaf = key.rpartition(".")
    siblings = {c.rpartition(".")[2]: c for c in candidates if c.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(leaf, list(siblings), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {siblings[close[0]]!r}?"
    elsewhere = [c for c in candidates if c.rpartition(".")[2] == leaf]
    elsewhere = elsewhere or difflib.get_close_matches(key, candidates, n=1, cutoff=0.6)
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; valid keys: {', '.join(sorted(siblings))}" if siblings else ""


def _nearest_file(path: Path) -> str:
    if path.exists() or not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.glob("*.y*ml")]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


# ---- other notations of integers ----------------------------------------------------------------

# Text that other YAML readers take for a number and PyYAML does not.
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]{1,2}")


def _integer(value: float | str) -> int | None:
    """The integer that a number, or text like "2.5e5", stands for, or None."""
    if isinstance(value, str) and not _EXPONENT.fullmatch(value):
        return None
    number = Decimal(str(value).replace("_", ""))
    return int(number) if number.is_finite() and number == number.to_integral_value() else None


def _with_integers(
    models: Sequence[type[BaseModel]], entries: Sequence[type[BaseModel]], data: Any
) -> Any:
    """Plain `data` with integers in Python's type where a setting takes nothing else.

    `models` are the possible schemas of `data`, or `entries` those of its values. This is done
    before the validation: in JSON mode, a validator could not pass lists and paths on.
    """
    if isinstance(data, list):
        return [_with_integers(models, entries, entry) for entry in data]
    if not isinstance(data, dict):
        return data
    found = {}
    for key, value in data.items():
        fields = [model.model_fields[key] for model in models if key in model.model_fields]
        kinds = [field.annotation for field in fields]
        if kinds and all(_takes_integers(kind) for kind in kinds):
            found[key] = _as_integers(value)
        else:
            below = [model for kind in kinds for model in _models_in(kind)]
            values = [model for kind in kinds for model in _entries_in(kind)]
            found[key] = _with_integers(below if kinds else entries, values, value)
    return found


def _as_integers(value: Any) -> Any:
    """`value`, or the numbers in a list, as integers where they are integral."""
    if isinstance(value, list | tuple):
        return [_as_integers(entry) for entry in value]
    if isinstance(value, float | str):
        found = _integer(value)
        return value if found is None else found
    return value


def _takes_integers(annotation: Any) -> bool:
    """Whether a setting is an integer, or a list of integers, and nothing else but null."""
    if typing.get_origin(annotation) is Annotated:
        return _takes_integers(typing.get_args(annotation)[0])
    inner = [a for a in typing.get_args(annotation) if a not in (type(None), Ellipsis)]
    if inner:
        return all(_takes_integers(each) for each in inner)
    return annotation is int
