"""Helpers of fuzz tests: the number of examples, the check of errors, and hostile variants of valid input.

A parser that is given foreign bytes either accepts them or raises one of the errors that its docstring names, in one
line. GRADSTREAM_FUZZ_EXAMPLES sets the number of examples (docs/fuzzing.md).
"""

from __future__ import annotations

import copy
import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from gradstream.core.errors import MAX_MESSAGE_CHARACTERS, GradstreamError

NUM_EXAMPLES = int(os.environ.get("GRADSTREAM_FUZZ_EXAMPLES") or 40)

T = TypeVar("T")
M = TypeVar("M", bound=Message)


def fuzzed(share: float = 1.0) -> settings:
    """Make the settings of a fuzz test that tries `share` times the usual number of examples."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=max(5, int(NUM_EXAMPLES * share)), deadline=None, suppress_health_check=checks)


def taken(parse: Callable[[], T], *refusals: type[GradstreamError]) -> T | None:
    """Return the result of `parse`, or None when it raises one of `refusals`. Any other exception fails the test."""
    try:
        return parse()
    except refusals as error:
        check_line(error)
        return None


def check_line(error: GradstreamError) -> None:
    """Check that an error's message is one line that any terminal shows and gRPC carries."""
    line = str(error)
    assert line, "an error without a message"
    assert line.isprintable(), f"not one plain line: {line[:200]!r}"
    assert len(line) <= MAX_MESSAGE_CHARACTERS, f"a line of {len(line)} characters"


@contextmanager
def allocating_at_most(num_bytes: int) -> Iterator[None]:
    """Fail when more than `num_bytes` are allocated at a time with Python's allocators, numpy's included."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak <= num_bytes, f"{peak} bytes were allocated at once, {num_bytes} are allowed"


# -- bytes -------------------------------------------------------------------------------------------------------------

WORDS = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"\x80" * 11,
    b"\xff\xff\xff\xff\x0f",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 30,
    b"9" * 5000,
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"[" * 3000,
    b'{"a":' * 3000,
    b"../../etc/passwd",
    b"/dev/zero",
    b"\\ud800",
    b"\\u0000",
    b"\n",
    b"\r\n",
    b"\x1b[2J",
    "\N{RIGHT-TO-LEFT OVERRIDE}\N{LINE SEPARATOR}×".encode(),
    b"&a [*a]",
    struct.pack("<Q", 2**63),
    struct.pack("<d", float("nan")),
    struct.pack("<I", 2**31),
)


@st.composite
def mutated_bytes(draw: st.DrawFn, seeds: Sequence[bytes], max_changes: int = 4) -> bytes:
    """Draw valid bytes with a few places flipped, cut, doubled, moved or overwritten by words that break parsers."""
    data = bytearray(draw(st.sampled_from(list(seeds))))
    for _ in range(draw(st.integers(0, max_changes))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        change = draw(
            st.sampled_from(["flip", "set", "insert", "overwrite", "drop", "double", "cut", "word", "splice"])
        )
        if change == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "set" and at < len(data):
            data[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B, 0x2D]))
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=20))
        elif change == "overwrite":
            data[at:end] = draw(st.binary(min_size=end - at, max_size=end - at))
        elif change == "drop":
            del data[at:end]
        elif change == "double":
            data[at:at] = data[at:end] * draw(st.integers(1, 50))
        elif change == "cut":
            del data[at:]
        elif change == "word":
            data[at:end] = draw(st.sampled_from(WORDS))
        elif change == "splice":
            other = draw(st.sampled_from(list(seeds)))
            begin = draw(st.integers(0, len(other)))
            data[at:end] = other[begin : begin + draw(st.integers(0, 60))]
    return bytes(data)


# -- JSON --------------------------------------------------------------------------------------------------------------

ODD_TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            "\0",
            "a\nb",
            "\x1b[2J",
            "\ud800",
            "../../etc/passwd",
            "/dev/zero",
            "~nobody-of-that-name/x",
            "job:",
            "nosuch://x",
            "file:///",
            "a" * 100_000,
            "\N{RIGHT-TO-LEFT OVERRIDE}x",
            "NaN",
            "{{ 1 / 0 }}",
            "{% for %}",
        ]
    ),
)
ODD_NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 255, 256, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320]
)
ODD_FLOATS = st.sampled_from([float("nan"), float("inf"), float("-inf")])
ODD_VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    ODD_NUMBERS,
    ODD_FLOATS,
    ODD_TEXTS,
    st.sampled_from([[], {}, [[]], [None], [1], ["x"], {"a": 1}, {"": None}]).map(copy.deepcopy),
    st.integers(100, 600).map(lambda depth: nested(depth)),
)


def nested(depth: int) -> Any:
    """Make a list nested `depth` times."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def paths_of(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of all values in a tree of mappings and lists, except the root."""
    found: list[tuple[Any, ...]] = [at] if at else []
    keys: Any = tree.keys() if isinstance(tree, Mapping) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        found += paths_of(tree[key], (*at, key))
    return found


@st.composite
def mutated_tree(draw: st.DrawFn, tree: Any, max_changes: int = 3) -> Any:
    """Draw a tree of JSON values in which a few are replaced, left out or repeated, or get unknown keys beside them."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(0, max_changes))):
        paths = paths_of(tree)
        if not paths:
            break
        *parents, key = draw(st.sampled_from(paths))
        parent = tree
        for part in parents:
            parent = parent[part]
        change = draw(st.sampled_from(["replace", "replace", "drop", "add", "repeat"]))
        if change == "drop":
            del parent[key]
        elif change == "add" and isinstance(parent, dict):
            parent[draw(ODD_TEXTS)] = draw(ODD_VALUES)
        elif change == "repeat" and isinstance(parent, list):
            parent += [copy.deepcopy(parent[key])] * draw(st.integers(1, 5))
        else:
            parent[key] = draw(ODD_VALUES)
    return tree


# -- protobuf ----------------------------------------------------------------------------------------------------------

_UNSIGNED = st.sampled_from([0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**32 - 1])
_LONG = st.one_of(_UNSIGNED, st.sampled_from([2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]))
_TEXTS = ODD_TEXTS.map(lambda text: text.encode("utf-8", "replace").decode()[:1000])
_ENUMS = st.sampled_from([0, 1, 2, 3, 99, 2**31 - 1])


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kinds = FieldDescriptor
    if field.type in (kinds.TYPE_DOUBLE, kinds.TYPE_FLOAT):
        return st.one_of(ODD_FLOATS, st.sampled_from([0.0, -1.0, 1.0, 1e300]))
    if field.type == kinds.TYPE_BOOL:
        return st.booleans()
    if field.type == kinds.TYPE_STRING:
        return _TEXTS
    if field.type == kinds.TYPE_BYTES:
        return st.binary(max_size=50)
    if field.type == kinds.TYPE_ENUM:
        return _ENUMS
    if field.type in (kinds.TYPE_UINT64, kinds.TYPE_FIXED64):
        return _LONG
    if field.type in (kinds.TYPE_INT64, kinds.TYPE_SINT64, kinds.TYPE_SFIXED64):
        return _LONG.map(lambda value: min(value, 2**63 - 1))
    if field.type in (kinds.TYPE_INT32, kinds.TYPE_SINT32, kinds.TYPE_SFIXED32):
        return _UNSIGNED.map(lambda value: min(value, 2**31 - 1))
    return _UNSIGNED


@st.composite
def mutated_message(draw: st.DrawFn, message: M, max_changes: int = 3) -> M:
    """Draw a message with a few fields cleared, repeated or set to values that no peer would send.

    Fields of nested messages are changed, too. The message may have unknown fields.
    """
    changed = type(message)()
    changed.CopyFrom(message)
    for _ in range(draw(st.integers(0, max_changes))):
        _change(draw, changed)
    if draw(st.booleans()) and draw(st.booleans()):
        unknown = b"\xfa\x7f" + bytes([draw(st.integers(0, 20))])
        changed.MergeFromString(unknown + b"x" * unknown[-1])
    return changed


def _change(draw: st.DrawFn, message: Message) -> None:
    field = draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
    if draw(st.integers(0, 5)) == 0:
        message.ClearField(field.name)
        return
    held: Any = getattr(message, field.name)
    if field.is_repeated:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if len(held) and draw(st.booleans()):
                _change(draw, held[draw(st.integers(0, len(held) - 1))])
            elif len(held):
                held.extend([held[0]] * draw(st.integers(1, 4)))
            else:
                held.add()
            return
        values = list(held)
        at = draw(st.integers(0, len(values)))
        values[at : at + draw(st.integers(0, 2))] = draw(st.lists(_values(field), max_size=4))
        message.ClearField(field.name)
        getattr(message, field.name).extend(values)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        _change(draw, held)
    else:
        setattr(message, field.name, draw(_values(field)))
