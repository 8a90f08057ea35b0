"""TOML out of plain values.

The standard library only reads TOML. Files here are tables of texts and numbers, so
this is shorter than what one more dependency would ask of everybody who installs.
"""

from __future__ import annotations

import json
from typing import Any


def toml_text(values: dict[str, Any]) -> str:
    """`values` as a TOML file: dicts are tables, lists of dicts arrays of tables.

    None is left out. Numbers are written so that they are read back to the bit.
    """
    return "".join(f"{line}\n" for line in _lines(values, ())).lstrip("\n")


def _lines(table: dict[str, Any], place: tuple[str, ...]) -> list[str]:
    """Plain values come first: what follows a header belongs to that table."""
    lines = []
    inner: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, dict) or _are_tables(value):
            inner.append((key, value))
        elif value is not None:
            lines.append(f"{key} = {_value(value)}")
    for key, value in inner:
        path = (*place, key)
        name = ".".join(path)
        for each in value if isinstance(value, list) else [value]:
            header = f"[[{name}]]" if isinstance(value, list) else f"[{name}]"
            lines += ["", header, *_lines(each, path)]
    return lines


def _are_tables(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) for each in value)
    )


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "\n".join(["[", *(f"  {_value(each)}," for each in value), "]"])
    if isinstance(value, list):
        return f"[{', '.join(_value(each) for each in value)}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's; it lets DEL pass, which TOML does not.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text or "e" in text else f"{text}.0"
    return repr(value)
