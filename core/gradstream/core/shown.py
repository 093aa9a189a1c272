"""Untrusted text for a terminal, with control characters written out.

A node's name, a log line, an event's reason or generated text may hold escape sequences, which could move the cursor,
hide text or reorder it. A terminal must show these sequences and not execute them.
"""

from __future__ import annotations

import re

# C0 except tab and newline, DEL, C1; the characters that reorder a line (Unicode's embeddings, overrides and isolates);
# halves of surrogate pairs, which UTF-8 cannot encode.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""The text with control characters written out as in `\x1b`; tabs, newlines and all letters stay."""
    return _UNSHOWN.sub(lambda match: _written(match[0]), text)


def shown_json(text: str) -> str:
    r"""A JSON document with the same characters as JSON escapes, like `\u009b`; its meaning stays the same."""
    return _UNSHOWN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _written(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
