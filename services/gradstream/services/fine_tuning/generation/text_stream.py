"""Text of tokens as they come: only what later tokens cannot change any more."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Tokens of the prompt that are decoded along, so that a tokenizer that writes a word's blank as part of it (Metaspace)
# does not take the completion for the beginning of a text.
CONTEXT_TOKENS = 8
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens by their texts."""
    return {str(added.content): int(token) for token, added in tokenizer.added_tokens_decoder.items() if added.special}


class Detokenizer:
    """Turns tokens into text one by one. Special tokens have none.

    All texts together are what the completion adds to the prompt when both are decoded at once. Only the tokens since
    the last text but one are decoded again, so a token's cost does not grow with the completion.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        # Left out of all that is decoded: a run of byte tokens goes on across them.
        self._special = set(special_tokens(tokenizer).values())
        ids = [token for token in prompt_ids if token not in self._special]
        begin = max(0, len(ids) - CONTEXT_TOKENS)
        # A run of byte tokens from its middle on is no text.
        while begin > 0 and self._is_byte(ids[begin]):
            begin -= 1
        self._ids = ids[begin:]
        self._before = self._decode(self._ids)
        self._num_before = len(self._ids)

    def push(self, token: int) -> str:
        """The text that became certain with `token`; "" while a character is incomplete."""
        if token in self._special:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        # A run of byte tokens is read as a whole: one that does not fit makes all of them unreadable.
        if text.endswith(_INCOMPLETE) or self._is_byte(token):
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """The rest, when no more tokens come: what was incomplete becomes U+FFFD."""
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
        # Cleaning up blanks would take back what was already sent.
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopScanner:
    """Ends a text before the first of the stop texts: the one that is complete first; of several that end together the
    longest. What may be the beginning of one is held back."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What of the held and the new text can be shown. Sets `stopped` when a stop text was found."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        num_held = max((_num_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Tokens in, text that can be shown out."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]):
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._scanner = StopScanner(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop text came; nothing may be pushed then."""
        return self._scanner.stopped

    def push(self, token: int) -> str:
        """The text that `token` made certain; "" when there is none yet."""
        return self._scanner.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """The rest of the text, when no more tokens come."""
        text = self._scanner.push(self._detokenizer.flush())
        return text if self.stopped else text + self._scanner.flush()


def _num_common(left: str, right: str) -> int:
    """Characters that both begin with."""
    if right.startswith(left):
        return len(left)
    return next((at for at, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), len(right))


def _num_begun(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with, not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
