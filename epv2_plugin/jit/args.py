"""Arguments of kernels: a C++ header owns each struct, Python reads it, and kernels are compiled against that reading.

A header (`csrc/kernels/*/args.h`) holds structs of `uint64_t int64_t uint32_t int32_t float double`, of structs above
them and of arrays of these, one field a line, and comments after `//`; `#include "FOLDER/args.h"` takes the structs of
another. Anything else is an error: a kernel might not skip what this parser skipped.
"""

from __future__ import annotations

import ctypes
import keyword
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

_Field: TypeAlias = "ctypes._SimpleCData[Any] | ctypes.Structure | ctypes.Array[Any]"

TYPES: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "uint64_t": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_CODES: dict[type[_Field], str] = {
    ctypes.c_uint64: "Q",
    ctypes.c_int64: "q",
    ctypes.c_uint32: "I",
    ctypes.c_int32: "i",
    ctypes.c_float: "f",
    ctypes.c_double: "d",
}
_HEAD = re.compile(r"struct\s+([A-Za-z]\w*)\s*\{")
_FIELD = re.compile(r"(\w+)\s+([A-Za-z]\w*)\s*(?:\[([1-9]\d*)\])?\s*;")
_OUTSIDE = re.compile(r"#pragma once|#include\s+<[\w./]+>")
_INCLUDE = re.compile(r'#include\s+"([\w./]+)"')


class HeaderError(ValueError):
    """An argument header that can't be read; the message is one line: file:line: what is wrong: the text there."""


@dataclass(frozen=True)
class _Packing:
    """How the fields of a struct become its bytes: `packer` takes them in the order of `zeros`; `places` is where each
    begins, and how it is packed alone."""

    packer: struct.Struct
    places: dict[str, tuple[int, struct.Struct]]
    codes: dict[str, str]
    zeros: dict[str, Any]
    nested: tuple[str, ...]


class Arguments(ctypes.Structure):
    """Base of the structs that `load` makes."""

    __slots__ = ()
    _packing: ClassVar[_Packing]

    @classmethod
    def pack(cls, **values: Any) -> bytes:
        """The struct's bytes; fields that are not given are zero, a struct or array in it is given as its own bytes.

        A launch needs about thirty fields, and setting them one by one takes longer than the launch.

        Raises:
            AttributeError: the struct has no such field.
            OverflowError: a value does not fit in its field.
        """
        how = cls._packing
        fields = how.zeros | values
        if len(fields) > len(how.zeros):
            raise AttributeError(f"{cls.__name__} has no field {next(n for n in values if n not in how.zeros)!r}")
        for name in how.nested:
            if len(fields[name]) != len(how.zeros[name]):
                raise OverflowError(f"{cls.__name__}.{name}: {len(fields[name])} bytes, must be {len(how.zeros[name])}")
        try:
            return how.packer.pack(*fields.values())
        except struct.error:
            for name, code in how.codes.items():
                try:
                    struct.pack(f"<{code}", fields[name])
                except struct.error as error:
                    raise OverflowError(f"{cls.__name__}.{name} = {fields[name]}: {error}") from None
            raise

    @classmethod
    def fill(cls, packed: bytes, **values: float) -> bytes:
        """What `pack` made, with other values in some fields: faster than all of them again.

        Raises:
            AttributeError: the struct has no such field. OverflowError: a value does not fit in its field.
        """
        made = bytearray(packed)
        for name, value in values.items():
            try:
                offset, packer = cls._packing.places[name]
                packer.pack_into(made, offset, value)
            except KeyError:
                raise AttributeError(f"{cls.__name__} has no field {name!r}") from None
            except struct.error as error:
                raise OverflowError(f"{cls.__name__}.{name} = {value}: {error}") from None
        return bytes(made)


def _packing(fields: Mapping[str, type[_Field]]) -> _Packing:
    layout = type("_", (ctypes.Structure,), {"_fields_": [*fields.items()]})
    parts, end, places = ["<"], 0, {}
    codes = {name: _CODES.get(kind, f"{ctypes.sizeof(kind)}s") for name, kind in fields.items()}
    for name, kind in fields.items():
        offset = getattr(layout, name).offset
        parts.append(f"{offset - end}x{codes[name]}")
        places[name] = (offset, struct.Struct(f"<{codes[name]}"))
        end = offset + ctypes.sizeof(kind)
    parts.append(f"{ctypes.sizeof(layout) - end}x")
    nested = tuple(name for name, kind in fields.items() if kind not in _CODES)
    zeros = {name: bytes(ctypes.sizeof(kind)) if name in nested else 0 for name, kind in fields.items()}
    return _Packing(struct.Struct("".join(parts)), places, codes, zeros, nested)


def load(path: Path) -> dict[str, type[Arguments]]:
    """The structs of an argument header by name, in the header's order, laid out as C++ does; included ones come along.

    Raises:
        HeaderError: a line that is not understood, named with file, line number and text.
        OSError: the file can't be read.
    """
    structs: dict[str, type[Arguments]] = {}
    name, begun = "", 0
    fields: dict[str, type[_Field]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("//", 1)[0].strip()

        def fail(what: str, number: int = number, text: str = text) -> HeaderError:
            return HeaderError(f"{path}:{number}: {what}: {text}")

        if not text:
            continue
        if not name:
            if include := _INCLUDE.fullmatch(text):
                structs |= load(path.parent.parent / include[1])
            elif head := _HEAD.fullmatch(text):
                name, begun, fields = head[1], number, {}
                if name in structs:
                    raise fail(f"struct {name} is there already")
            elif not _OUTSIDE.fullmatch(text):
                raise fail("must be '#pragma once', an #include, a comment or 'struct NAME {'")
        elif text == "};":
            if not fields:
                raise fail(f"struct {name} has no fields")
            body = {"__slots__": (), "_fields_": [*fields.items()], "_packing": _packing(fields)}
            structs[name] = type(name, (Arguments,), body)
            name = ""
        else:
            field = _FIELD.fullmatch(text)
            if field is None:
                raise fail(f"must be 'TYPE NAME;', 'TYPE NAME[COUNT];' or '}};' in struct {name}")
            if field[1] not in TYPES and field[1] not in structs:
                raise fail(f"type {field[1]!r} is not one of {', '.join([*TYPES, *structs])}")
            if field[2] in fields:
                raise fail(f"field {field[2]} of struct {name} is there already")
            if keyword.iskeyword(field[2]):
                raise fail(f"{field[2]!r} is a word of Python's and can't be set as a field")
            kind: type[Any] = TYPES[field[1]] if field[1] in TYPES else structs[field[1]]
            fields[field[2]] = kind * int(field[3]) if field[3] else kind
    if name:
        raise HeaderError(f"{path}:{begun}: struct {name} is not closed by '}};'")
    return structs


def layout_asserts(structs: Mapping[str, type[Arguments]]) -> str:
    """C++ text that fails to compile where a struct's size or a field's offset or size differs from Python's.

    It needs the structs' own header before it.
    """
    lines = ["#include <cstddef>"]
    for name, kind in structs.items():
        checks = [(f"sizeof({name})", ctypes.sizeof(kind))]
        for field, *_ in kind._fields_:
            place = getattr(kind, field)
            checks += [(f"offsetof({name}, {field})", place.offset), (f"sizeof({name}::{field})", place.size)]
        lines += [f'static_assert({what} == {value}, "{name}: C++ and Python differ");' for what, value in checks]
    return "\n".join(lines) + "\n"
