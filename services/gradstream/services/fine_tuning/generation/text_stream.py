"""Turns tokens into text as they come, and gives out only text that later tokens cannot change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Tokens of the prompt that are decoded together with the completion. Without them a tokenizer that encodes a blank with
# the word after it (Metaspace) would treat the completion as the beginning of a text, and drop its first blank.
CONTEXT_TOKENS = 8
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of the special tokens by their texts."""
    return {str(added.content): int(token) for token, added in tokenizer.added_tokens_decoder.items() if added.special}


class Detokenizer:
    """Turns tokens into text one by one. Special tokens have no text.

    Joined, the texts are the text that the completion adds to the prompt when both are decoded at once. Only the tokens
    since the last text but one are decoded again, so a token's cost does not grow with the completion.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        # Special tokens are left out before decoding: a run of byte tokens goes on across them.
        self._special = set(special_tokens(tokenizer).values())
        ids = [token for token in prompt_ids if token not in self._special]
        begin = max(0, len(ids) - CONTEXT_TOKENS)
        # The context must not begin inside a run of byte tokens, which could not be decoded.
        while begin > 0 and self._is_byte(ids[begin]):
            begin -= 1
        self._ids = ids[begin:]
        self._before = self._decode(self._ids)
        self._num_before = len(self._ids)

    def push(self, token: int) -> str:
        """Add a token; return the text that became final with it, "" while a character is incomplete."""
        if token in self._special:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        # A run of byte tokens is decoded as a whole: one invalid token makes the whole run unreadable.
        if text.endswith(_INCOMPLETE) or self._is_byte(token):
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """Return the remaining text, when no more tokens come. Incomplete characters become U+FFFD."""
        return self._settle(self._decode(self._ids))

    def _is_byte(self, token: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "") is not None

    def _settle(self, text: str) -> str:
        new = text[_num_common(self._before, text) :]
        if new:
            self._ids = self._ids[self._num_before :]
            self._num_before = len(self._ids)
            self._before = self._decode(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up blanks could change text that was already sent.
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopScanner:
    """Ends a text before the first stop text in it.

    The first stop text is the one that is complete first; of several that end together, the longest. Text that may be
    the beginning of a stop text is held back.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return the held and new text that can be shown. Sets `stopped` when a stop text was found."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        num_held = max((_num_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """Return the text that was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Turns tokens into text that can be shown, up to a stop text."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]):
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._scanner = StopScanner(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop text came. After that no token may be pushed."""
        return self._scanner.stopped

    def push(self, token: int) -> str:
        """Add a token; return the text that became final with it, "" when there is none yet."""
        return self._scanner.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """Return the remaining text, when no more tokens come."""
        text = self._scanner.push(self._detokenizer.flush())
        return text if self.stopped else text + self._scanner.flush()


def _num_common(left: str, right: str) -> int:
    """The number of leading characters that both texts have in common."""
    if right.startswith(left):
        return len(left)
    return next((at for at, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), len(right))


def _num_begun(text: str, stop: str) -> int:
    """The number of characters at the end of `text` with which `stop` begins, fewer than all of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
