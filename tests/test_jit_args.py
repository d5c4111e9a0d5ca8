"""Argument headers: what is read, what is refused and how, and that g++ lays structs out as Python does."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epv2_plugin.jit import args, kernels

HEADER = """#pragma once
#include <cstdint>
// Stage.
struct DispatchStageArgs {
  uint64_t window;   // ncclWindow_t
  int32_t num_tokens;

  float scale;
};

struct Second { // with a comment
  uint32_t a;
  int64_t b;
};
"""


@pytest.fixture
def header(tmp_path: Path) -> Path:
    path = tmp_path / "args.h"
    path.write_text(HEADER)
    return path


def test_structs_are_read_in_order(header):
    structs = args.load(header)
    assert list(structs) == ["DispatchStageArgs", "Second"]
    stage, second = structs.values()
    assert issubclass(stage, ctypes.Structure)
    assert [name for name, _ in stage._fields_] == ["window", "num_tokens", "scale"]
    assert (ctypes.sizeof(stage), ctypes.sizeof(second), second.b.offset) == (16, 16, 8)
    made = stage.from_buffer_copy(stage.pack(num_tokens=-3, window=2**64 - 1, scale=0.5))
    assert (made.window, made.num_tokens, made.scale) == (2**64 - 1, -3, 0.5)
    assert stage.pack() == bytes(16)
    assert second.pack(b=-1) == bytes(8) + b"\xff" * 8  # with what a compiler leaves free before it


def test_fields_are_filled_in(header):
    stage = args.load(header)["DispatchStageArgs"]
    packed = stage.pack(num_tokens=-3, window=7, scale=0.5)
    made = stage.from_buffer_copy(stage.fill(packed, window=2**64 - 1, num_tokens=4))
    assert (made.window, made.num_tokens, made.scale) == (2**64 - 1, 4, 0.5)
    assert stage.from_buffer_copy(packed).num_tokens == -3
    with pytest.raises(AttributeError, match="DispatchStageArgs has no field 'tokens'"):
        stage.fill(packed, tokens=1)
    with pytest.raises(OverflowError, match=r"DispatchStageArgs\.num_tokens = 4294967296"):
        stage.fill(packed, num_tokens=2**32)


def test_structs_in_structs_are_packed_as_their_bytes(tmp_path):
    path = tmp_path / "args.h"
    path.write_text(HEADER + "struct Outer {\n  uint32_t a;\n  Second inner;\n  uint32_t z;\n};\n")
    inner, outer = (args.load(path)[name] for name in ("Second", "Outer"))
    made = outer.from_buffer_copy(outer.pack(z=9, inner=inner.pack(a=7, b=-8), a=1))
    assert (made.a, made.inner.a, made.inner.b, made.z) == (1, 7, -8, 9)
    with pytest.raises(OverflowError, match=r"Outer\.inner: 3 bytes, must be 16"):
        outer.pack(inner=b"abc")


def test_arrays_are_packed_as_their_bytes(tmp_path):
    path = tmp_path / "args.h"
    path.write_text(HEADER + "struct Outer {\n  uint32_t a;\n  Second inner[2];\n  int32_t z[3];\n};\n")
    inner, outer = (args.load(path)[name] for name in ("Second", "Outer"))
    made = outer.from_buffer_copy(outer.pack(a=1, inner=inner.pack(a=7) + inner.pack(b=-8), z=b"\1" + bytes(11)))
    assert (made.a, made.inner[0].a, made.inner[1].b, list(made.z)) == (1, 7, -8, [1, 0, 0])
    assert outer.pack() == bytes(8 + 32 + 16)
    with pytest.raises(OverflowError, match=r"Outer\.inner: 16 bytes, must be 32"):
        outer.pack(inner=inner.pack())


def test_structs_of_another_header_come_along(tmp_path):
    for folder, text in {"ep": HEADER, "engram": '#include "ep/args.h"\nstruct Outer {\n  Second inner;\n};\n'}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "args.h").write_text(text)
    structs = args.load(tmp_path / "engram" / "args.h")
    assert list(structs) == ["DispatchStageArgs", "Second", "Outer"]
    assert structs["Outer"].pack(inner=structs["Second"].pack(b=3)) == bytes(8) + b"\3" + bytes(7)


def test_wrong_values_are_refused(header):
    stage = args.load(header)["DispatchStageArgs"]
    with pytest.raises(AttributeError, match="DispatchStageArgs has no field 'num_tokns'"):
        stage.pack(num_tokns=3)
    with pytest.raises(OverflowError, match=re.escape("DispatchStageArgs.num_tokens = 2147483648: ")):
        stage.pack(num_tokens=2**31)
    with pytest.raises(OverflowError, match=re.escape("DispatchStageArgs.window = -1: ")):
        stage.pack(window=-1)
    with pytest.raises(OverflowError, match=re.escape("DispatchStageArgs.num_tokens = 1.5: ")):
        stage.pack(num_tokens=1.5)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (
            "struct A {\n  short x;\n};",
            2,
            "type 'short' is not one of uint64_t, int64_t, uint32_t, int32_t, float, double",
        ),
        ("struct A {\n  int32_t x, y;\n};", 2, "must be 'TYPE NAME;'"),
        ("struct A {\n  int32_t x[0];\n};", 2, "must be 'TYPE NAME;', 'TYPE NAME[COUNT];'"),
        ("struct A {\n  int32_t x[n];\n};", 2, "must be 'TYPE NAME;', 'TYPE NAME[COUNT];'"),
        ("struct A {\n  int32_t x = 4;\n};", 2, "must be 'TYPE NAME;'"),
        ("struct A {\n  int32_t x\n};", 2, "must be 'TYPE NAME;'"),
        ("struct A {\n  int32_t* x;\n};", 2, "must be 'TYPE NAME;'"),
        ("struct A {\n  float x;\n  float x;\n};", 3, "field x of struct A is there already"),
        ("struct A {\n  float lambda;\n};", 2, "'lambda' is a word of Python's"),
        ("struct A {\n  float _fields_;\n};", 2, "must be 'TYPE NAME;'"),
        ("struct A {\n};", 2, "struct A has no fields"),
        ("struct A {\n  float x;\n};\nstruct A {\n", 4, "struct A is there already"),
        ("\nstruct A {\n  float x;\n", 2, "struct A is not closed"),
        ("struct A { float x; };", 1, "must be '#pragma once'"),
        ("struct A\n{", 1, "must be '#pragma once'"),
        ("#ifdef B", 1, "must be '#pragma once'"),
        ("/* note */", 1, "must be '#pragma once'"),
        ("struct __attribute__((packed)) A {", 1, "must be '#pragma once'"),
    ],
)
def test_lines_that_are_not_understood_are_named(tmp_path, text, line, what):
    path = tmp_path / "args.h"
    path.write_text(text)
    with pytest.raises(args.HeaderError, match=re.escape(f"{path}:{line}: ")) as caught:
        args.load(path)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return tmp_path_factory.mktemp("layout")


fields_of_struct = st.lists(st.sampled_from(list(args.TYPES)), min_size=1, max_size=12)


@given(structs=st.lists(fields_of_struct, min_size=1, max_size=8))
@settings(max_examples=12)
def test_layout_is_that_of_a_compiler(scratch, structs):
    text = "#include <cstdint>\n"
    for number, fields in enumerate(structs):
        lines = [f"  {kind} f{index};\n" for index, kind in enumerate(fields)]
        text += f"struct S{number} {{\n{''.join(lines)}}};\n"
    header = scratch / "args.h"
    header.write_text(text)
    read = args.load(header)
    words, ours = [], []
    for name, struct in read.items():
        words += [f"sizeof({name})", *(f"offsetof({name}, {field})" for field, _ in struct._fields_)]
        ours += [ctypes.sizeof(struct), *(getattr(struct, field).offset for field, _ in struct._fields_)]
    program = f'#include <cstdio>\n#include "args.h"\n{args.layout_asserts(read)}'
    program += "int main() {\n" + "".join(f'  printf("%zu\\n", {word});\n' for word in words) + "}\n"
    (scratch / "layout.cc").write_text(program)
    subprocess.run(["g++", "-std=c++17", "-o", "layout", "layout.cc"], cwd=scratch, check=True, timeout=60)
    printed = subprocess.run([scratch / "layout"], check=True, capture_output=True, text=True, timeout=60).stdout
    assert [int(line) for line in printed.split()] == ours


def test_another_layout_does_not_compile(header):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    asserts = args.layout_asserts(args.load(header))
    for ours, theirs in (("float scale", "uint64_t scale"), ("int32_t num_tokens", "int64_t num_tokens")):
        header.write_text(HEADER.replace(ours, theirs))
        source = header.with_name("check.cc")
        source.write_text(f'#include "args.h"\n{asserts}')
        run = subprocess.run(
            ["g++", "-fsyntax-only", source.name], cwd=header.parent, capture_output=True, text=True, timeout=60
        )
        assert run.returncode != 0
        assert "DispatchStageArgs: C++ and Python differ" in run.stderr


def test_a_kernel_names_its_struct(tmp_path, monkeypatch):
    (tmp_path / "ep").mkdir()
    (tmp_path / "ep" / "args.h").write_text(HEADER)
    monkeypatch.setattr(kernels, "source_root", lambda: tmp_path)
    kernel = kernels.Kernel("epv2_stage", "ep/stage.cu", "Second", (("EPV2_DTYPE", "bf16"), ("EPV2_FP8", "1")))
    assert kernel.label == "epv2_stage EPV2_DTYPE=bf16 EPV2_FP8=1"
    assert kernels.args_type(kernel).from_buffer_copy(kernels.args_type(kernel).pack(a=3)).a == 3
    assert kernels.args_type(kernel) is kernels.args_type(kernel)
    missing = kernels.Kernel("epv2_stage", "ep/stage.cu", "Third")
    with pytest.raises(args.HeaderError, match="has no struct Third, only: DispatchStageArgs, Second"):
        kernels.args_type(missing)


def test_device_code_is_found_in_the_package_or_beside_it(tmp_path, monkeypatch):
    package = tmp_path / "epv2_plugin"
    package.mkdir()
    monkeypatch.setattr(kernels.epv2_plugin, "__file__", str(package / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="no device code"):
        kernels.source_root()
    (tmp_path / "csrc").mkdir()
    assert kernels.source_root() == tmp_path / "csrc" / "kernels"
    (package / "csrc").mkdir()
    assert kernels.source_root() == package / "csrc" / "kernels"
