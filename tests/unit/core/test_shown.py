"""Foreign text on a terminal."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.shown import shown, shown_json


def test_control_characters_are_written_out_and_letters_stay() -> None:
    assert shown("\x1b[31mred\x1b[0m\r\x9b2J\u202e\ud800") == r"\x1b[31mred\x1b[0m\x0d\x9b2J\u202e\ud800"
    assert shown("a\tb\nÄ é 漢字 עברית 😀") == "a\tb\nÄ é 漢字 עברית 😀"


@given(st.text())
def test_json_means_the_same_text(text: str) -> None:
    document = shown_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(document) == text
    assert document.isprintable() or shown(document) == document
