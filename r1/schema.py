"""Nested frozen dataclasses from plain dicts and `dotted.key=value` texts, checked by type."""

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Where = Callable[[str], str]
# keys of old files -> what took their place, and with which values
RENAMED = {"model.gradient_checkpointing": ("long.mode", "true is 'checkpoint', false 'plain'")}


def build(cls: type, raw: Mapping[str, Any], where: Where = lambda key: "the given values") -> Any:
    """An instance of dataclass `cls` from nested mappings.

    Args:
        cls: a dataclass whose fields are bool, int, float, str, Literal, Any, tuples, dicts with
            string keys, dataclasses, or unions of these with None. "none" stands for None.
        raw: what a TOML file holds: sections are mappings, tuples are lists.
        where: dotted key -> where its value came from, for messages.

    Raises:
        ValueError: on an unknown key, a wrong type, a missing required key or a refused value;
            it names the dotted key, its origin and, for an unknown key, the nearest valid one.
    """
    known = list(keys(cls))
    return _convert(cls, raw, "", where, known)


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of dataclass `cls`, sections included."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        yield key
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{key}.")


def unknown_key(key: str, origin: str, known: list[str]) -> ValueError:
    """The error for a key no dataclass has; suggests the nearest of `known`."""
    new, values = RENAMED.get(key, ("", ""))
    if new in known:
        return ValueError(f"unknown key {key!r} ({origin}): it is {new!r} now, where {values}")
    section, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    near = [siblings[m] for m in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)]
    near = near or [k for k in known if k.rpartition(".")[2] == leaf]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return ValueError(f"unknown key {key!r} ({origin}); nearest: {near[0]!r}")


def set_override(cls: type, raw: dict[str, Any], text: str) -> str:
    """Puts `dotted.key=value` into `raw`, parsed by the field's type; returns the dotted key."""
    key, separator, value = text.partition("=")
    key = key.strip()
    origin = f"override {text!r}"
    if not separator or not key:
        raise ValueError(f"{origin}: write it as section.key=value")
    parts = key.split(".")
    kind: Any = cls
    node = raw
    default: Any = None
    for depth, part in enumerate(parts):
        if dataclasses.is_dataclass(kind):
            hints = get_type_hints(kind)
            if part not in hints:
                raise unknown_key(".".join(parts[: depth + 1]), origin, list(keys(cls)))
            field = next(f for f in dataclasses.fields(kind) if f.name == part)
            default = _default(field) if default is None else getattr(default, part)
            default = None if default is dataclasses.MISSING else default
            kind = hints[part]
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif kind is not Any:
            raise ValueError(f"key {key!r} ({origin}): {'.'.join(parts[:depth])!r} has no parts")
        if depth + 1 < len(parts):
            # One entry of a table is changed, the others keep the default.
            node = node.setdefault(part, dict(default) if isinstance(default, dict) else {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"key {key!r} ({origin}): {'.'.join(parts[: depth + 1])!r} is not a section"
                )
    try:
        node[parts[-1]] = _parse(kind, value.strip())
    except ValueError as error:
        raise ValueError(f"key {key!r} ({origin}): {error}") from None
    return key


def to_dict(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON-ready dicts and lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return value


def at_least(section: Any, minimum: float, *names: str) -> None:
    """Refuses a field below `minimum`; none passes. For `__post_init__`."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def positive(section: Any, *names: str) -> None:
    """Refuses a field that is not above 0; none passes."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def fraction(section: Any, *names: str) -> None:
    """Refuses a field outside [0, 1]; none passes."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(kind))
    if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
        return "a table"
    if get_origin(kind) is tuple:
        return "a list"
    return "none" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _convert(kind: Any, value: Any, key: str, where: Where, known: list[str]) -> Any:
    def wrong(note: str = "") -> ValueError:
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        return ValueError(
            f"key {key!r} ({where(key)}): expected {_describe(kind)}, got {shown}{note}"
        )

    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        if dataclasses.is_dataclass(value) and isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise wrong()
        return _convert_section(kind, value, key, where, known)
    if origin in (Union, types.UnionType):
        if type(None) in args and (value is None or value == "none"):
            return None
        inner = [option for option in args if option is not type(None)]
        if len(inner) == 1:
            return _convert(inner[0], value, key, where, known)
        for option in inner:
            try:
                return _convert(option, value, key, where, known)
            except ValueError:
                continue
        raise wrong()
    if origin is Literal:
        if value in args and type(value) in {type(option) for option in args}:
            return value
        near = difflib.get_close_matches(str(value), [str(option) for option in args], n=1)
        raise wrong(f"; nearest: {near[0]!r}" if near else "")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong()
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise wrong(f": needs {len(kinds)} items")
        items = zip(kinds, value, strict=True)
        return tuple(_convert(k, v, f"{key}[{i}]", where, known) for i, (k, v) in enumerate(items))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong()
        return {k: _convert(args[1], v, f"{key}.{k}", where, known) for k, v in value.items()}
    if kind is Any:
        return _convert_any(value, wrong)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong()
    if kind is float and not math.isfinite(value):
        raise wrong(": must be finite")
    return value


def _convert_section(
    cls: type,
    value: Mapping[str, Any],
    key: str,
    where: Where,
    known: list[str],
    default: Any = None,
) -> Any:
    prefix = f"{key}." if key else ""
    hints = get_type_hints(cls)
    # Inside a list of tables the key carries an index, which the known keys do not.
    siblings = [f"{prefix}{name}" for name in hints]
    for name in value:
        if name not in hints:
            local = known if siblings[0] in known else siblings
            raise unknown_key(f"{prefix}{name}", where(f"{prefix}{name}"), local)
    given = {}
    for field in dataclasses.fields(cls):
        name, kind, path = field.name, hints[field.name], f"{prefix}{field.name}"
        fallback = _default(field) if default is None else getattr(default, name)
        if dataclasses.is_dataclass(kind) and isinstance(value.get(name, {}), Mapping):
            start = None if fallback is dataclasses.MISSING else fallback
            given[name] = _convert_section(kind, value.get(name, {}), path, where, known, start)
        elif name in value:
            given[name] = _convert(kind, value[name], path, where, known)
        elif fallback is dataclasses.MISSING:
            raise ValueError(f"missing required key {path!r} ({where(path)})")
        else:
            given[name] = fallback
    try:
        return cls(**given)
    except ValueError as error:
        name = str(error).partition(" ")[0]
        source = where(prefix + name if name in hints else key)
        raise ValueError(f"key {prefix}{error} ({source})") from None


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _convert_any(value: Any, wrong: Callable[[str], ValueError]) -> Any:
    if isinstance(value, Mapping):
        return {key: _convert_any(item, wrong) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_convert_any(item, wrong) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong(": must be finite")
    if not isinstance(value, str | int | float | bool):
        raise wrong(": must be a text, number, boolean, list or table")
    return value


def _parse(kind: Any, text: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = [option for option in args if option is not type(None)]
        if text == "none" and len(inner) < len(args):
            return None
        kind = inner[0] if len(inner) == 1 else Any
        return _parse(kind, text)
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    if (kind is str or (origin is Literal and isinstance(args[0], str))) and not quoted:
        return text
    if kind in (int, float) and not quoted:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"expected {_describe(kind)}, got {text!r}") from None
    if origin is tuple and not text.startswith("["):
        return [_parse(args[0], item.strip()) for item in text.split(",") if item.strip()]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if kind is Any:
            return text
        raise ValueError(f"expected {_describe(kind)}, got {text!r}") from None
