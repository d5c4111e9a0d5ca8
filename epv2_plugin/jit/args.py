"""Arguments of kernels: a C++ header owns each struct, Python reads it, and kernels are compiled against that reading.

A header (`csrc/kernels/*/args.h`) holds structs of `uint64_t int64_t uint32_t int32_t float` and of structs above them,
one field a line, and comments after `//`. Anything else is an error: a kernel might not skip what this parser skipped.
"""

from __future__ import annotations

import ctypes
import keyword
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TYPES: dict[str, type[ctypes._SimpleCData]] = {
    "uint64_t": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
}
_RANGES = {
    ctypes.c_uint64: (0, 2**64 - 1),
    ctypes.c_int64: (-(2**63), 2**63 - 1),
    ctypes.c_uint32: (0, 2**32 - 1),
    ctypes.c_int32: (-(2**31), 2**31 - 1),
}
_HEAD = re.compile(r"struct\s+([A-Za-z]\w*)\s*\{")
_FIELD = re.compile(r"(\w+)\s+([A-Za-z]\w*)\s*;")
_OUTSIDE = re.compile(r'#pragma once|#include\s+(<[\w./]+>|"[\w./]+")')


class HeaderError(ValueError):
    """An argument header that can't be read; the message is one line: file:line: what is wrong: the text there."""


class Arguments(ctypes.Structure):
    """Base of the structs that `load` makes: unknown fields and numbers that do not fit are errors, not silence."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field.

        Raises:
            AttributeError: the struct has no such field.
            OverflowError: the number does not fit in the field; ctypes alone would cut it.
        """
        kind = type(self)._kinds.get(name)  # type: ignore[attr-defined]  # `load` makes it
        if kind is None:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        if kind in _RANGES:
            low, high = _RANGES[kind]
            if isinstance(value, int) and not low <= value <= high:
                raise OverflowError(f"{type(self).__name__}.{name} = {value}: must be from {low} to {high}")
        super().__setattr__(name, value)


def load(path: Path) -> dict[str, type[ctypes.Structure]]:
    """The structs of an argument header by name, in the header's order, laid out as C++ does.

    Raises:
        HeaderError: a line that is not understood, named with file, line number and text.
        OSError: the file can't be read.
    """
    structs: dict[str, type[ctypes.Structure]] = {}
    name, begun = "", 0
    fields: dict[str, type[ctypes._SimpleCData] | type[ctypes.Structure]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("//", 1)[0].strip()

        def fail(what: str, number: int = number, text: str = text) -> HeaderError:
            return HeaderError(f"{path}:{number}: {what}: {text}")

        if not text:
            continue
        if not name:
            if head := _HEAD.fullmatch(text):
                name, begun, fields = head[1], number, {}
                if name in structs:
                    raise fail(f"struct {name} is there already")
            elif not _OUTSIDE.fullmatch(text):
                raise fail("must be '#pragma once', an #include, a comment or 'struct NAME {'")
        elif text == "};":
            if not fields:
                raise fail(f"struct {name} has no fields")
            structs[name] = type(name, (Arguments,), {"__slots__": (), "_fields_": [*fields.items()], "_kinds": fields})
            name = ""
        else:
            field = _FIELD.fullmatch(text)
            if field is None:
                raise fail(f"must be 'TYPE NAME;' or '}};' in struct {name}")
            if field[1] not in TYPES and field[1] not in structs:
                raise fail(f"type {field[1]!r} is not one of {', '.join([*TYPES, *structs])}")
            if field[2] in fields:
                raise fail(f"field {field[2]} of struct {name} is there already")
            if keyword.iskeyword(field[2]):
                raise fail(f"{field[2]!r} is a word of Python's and can't be set as a field")
            fields[field[2]] = TYPES[field[1]] if field[1] in TYPES else structs[field[1]]
    if name:
        raise HeaderError(f"{path}:{begun}: struct {name} is not closed by '}};'")
    return structs


def layout_asserts(structs: Mapping[str, type[ctypes.Structure]]) -> str:
    """C++ text that fails to compile where a struct's size or a field's offset or size differs from Python's.

    It needs the structs' own header before it.
    """
    lines = ["#include <cstddef>"]
    for name, struct in structs.items():
        checks = [(f"sizeof({name})", ctypes.sizeof(struct))]
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            checks += [(f"offsetof({name}, {field})", place.offset), (f"sizeof({name}::{field})", place.size)]
        lines += [f'static_assert({what} == {value}, "{name}: C++ and Python differ");' for what, value in checks]
    return "\n".join(lines) + "\n"
