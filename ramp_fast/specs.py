"""Names with settings in one string, ``deletion:steps=50,granularity=patch:8``: as command lines give them."""

from __future__ import annotations

import ast
import re
from typing import Any

from ramp_fast.errors import InputError

# at commas that a new setting follows
_COMMA = re.compile(r",(?=\s*\w+\s*=)")


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings of ``name`` or ``name:key=value,key=value``; values are Python literals or text.

    Raises
    ------
    InputError
        A setting is not ``key=value``, is given twice, or none follows the colon.
    """
    name, colon, rest = spec.partition(":")
    if colon and not rest.strip():
        raise InputError(f"{spec!r}: no settings follow the colon; write {name}, or {name}:key=value")
    settings: dict[str, Any] = {}
    for piece in _COMMA.split(rest) if rest else ():
        key, equals, value = piece.partition("=")
        if not equals or not key.strip().isidentifier():
            raise InputError(f"{spec!r}: {piece!r} is not key=value; write {name}:key=value,key=value")
        if key.strip() in settings:
            raise InputError(f"{spec!r}: {key.strip()} is given twice")
        settings[key.strip()] = literal(value.strip())
    return name, settings


def literal(text: str) -> Any:
    """The value of a Python literal, of true, false and none in any case, or the text itself.

    Raises
    ------
    InputError
        It is nested deeper than Python can read.
    """
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):  # TypeError: a list as a key
        return text
    except (RecursionError, MemoryError) as error:
        raise InputError(f"{text[:20]}... is nested too deeply to be a value") from error


def check_flags(name: str, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise InputError where a setting that is true or false by default is given something else.

    Any other text would count as true.
    """
    for key, value in settings.items():
        if isinstance(defaults.get(key), bool) and not isinstance(value, bool):
            raise InputError(f"{name}: {key} must be true or false, got {value!r}")
