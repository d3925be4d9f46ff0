"""Names with settings in one string, ``deletion:steps=50,granularity=patch:8``: as command lines give them."""

from __future__ import annotations

import ast
import re
from typing import Any

from ramp_fast.errors import InputError

# at commas that are not inside brackets
_COMMA = re.compile(r",(?![^(\[]*[)\]])")


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings of ``name`` or ``name:key=value,key=value``; values are Python literals or text.

    Raises
    ------
    InputError
        A setting is not ``key=value``.
    """
    name, _, rest = spec.partition(":")
    settings: dict[str, Any] = {}
    for piece in _COMMA.split(rest) if rest else ():
        key, equals, value = piece.partition("=")
        if not equals or not key.strip().isidentifier():
            raise InputError(f"{spec!r}: {piece!r} is not key=value; write {name}:key=value,key=value")
        try:
            settings[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            settings[key.strip()] = value.strip()
    return name, settings
