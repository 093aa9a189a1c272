"""Encodes text to token ids and decodes ids to text, as transformers does.

A rendered conversation is encoded as a whole, so its ids are those of transformers' `apply_chat_template`. A prompt and
its completion are encoded without a token that spans both. So the targets are exact, and a prompt has the same ids with
a completion after it as without one. A special token that is written out in a prompt, a completion or a document is
encoded as that token; in a message of a conversation it is encoded as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gradstream.core.errors import ConfigError
from gradstream.core.foreign import Guarded, parsing
from gradstream.core.pretrained.tokenizer import end_ids
from gradstream.services.fine_tuning.examples.reading import BadRowError

Piece = tuple[str, bool]
"""Text, and whether its tokens are targets."""
Span = tuple[int, int]
"""The characters [begin, end) of a text from which a token comes."""
# Texts that are put before a piece and removed again, where a tokenizer adds a blank before every text.
SENTINELS = ("\n", "|", "0")
PROBE = "x"


class Encoder:
    """Encodes and decodes examples with a base's tokenizer.

    Raises ConfigError for a tokenizer without end of text or without a tokenizer.json.
    """

    def __init__(self, tokenizer: Any):
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError("the base's tokenizer has no tokenizer.json; save it again as a fast tokenizer")
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the base's tokenizer names no end-of-text token; set eos_token in its tokenizer_config.json"
            )
        # A copy, because truncation and padding, which a tokenizer.json may configure, must be off here.
        with parsing(_unusable):
            whole: Any = Guarded(Tokenizer.from_str(backend.to_str()), _unusable)
        whole.no_truncation()
        whole.no_padding()
        self.content: bytes = whole.to_str(pretty=True).encode("utf-8")
        """The content of tokenizer.json."""
        # Without the post-processor: some post-processors leave blanks out of the tokens' places in the text.
        with parsing(_unusable):
            bare_json = json.dumps({**json.loads(self.content), "post_processor": None})
            self._backend: Any = Guarded(Tokenizer.from_str(bare_json), _unusable)
            num_known = len(tokenizer)
        self.end_of_text_id = int(tokenizer.eos_token_id)
        self.end_ids = end_ids(tokenizer)
        """All tokens that end a text or a reply."""
        self.vocab_size = max(num_known, 1 + max(self._backend.get_vocab(with_added_tokens=True).values()))
        bare, around = self.ids(PROBE), list(whole.encode(PROBE).ids)
        begin = next((n for n in range(len(around)) if around[n : n + len(bare)] == bare), 0)
        self.begin_ids: tuple[int, ...] = tuple(around[:begin])
        """The ids that the tokenizer puts before every text by default, usually bos."""
        self.special_tokens: tuple[str, ...] = tuple(
            token.content for token in self._backend.get_added_tokens_decoder().values() if token.special
        )
        """The texts of the special tokens."""
        longest_first = sorted(filter(None, self.special_tokens), key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        """Matches any special token."""
        self._adds_blank = self.decode(self.ids("x") + self.ids("x")) != "xx"

    @property
    def bos_id(self) -> int | None:
        """The first id that the tokenizer puts before every text; None if it puts none."""
        return self.begin_ids[0] if self.begin_ids else None

    def ids(self, text: str) -> list[int]:
        """Encode a text that stands at the beginning, without bos."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Encode a text with the tokenizer's `begin_ids` before it, unless the text already begins with them."""
        ids = self.ids(text)
        begun = tuple(ids[: len(self.begin_ids)]) == self.begin_ids
        return ids if begun else [*self.begin_ids, *ids]

    def ids_after(self, text: str, before: str) -> list[int]:
        """Encode `text` as it follows `before`, with no token that has characters of both.

        The ids are those of the two texts encoded as one. Exception: where a token would span both, `text` is encoded
        alone, without the blank that some tokenizers begin with.
        """
        head, whole = self.ids(before), self.ids(before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
        if self._adds_blank:
            for sentinel in SENTINELS:
                head, whole = self.ids(sentinel), self.ids(sentinel + text)
                if whole[: len(head)] == head:
                    return whole[len(head) :]
        return self.ids(text)

    def pieces(self, pieces: Iterable[Piece], bos: bool) -> tuple[list[int], list[bool]]:
        """Encode pieces to ids, each with whether it is a target. `bos`: begin with the tokenizer's `begin_ids`."""
        ids: list[int] = []
        is_target: list[bool] = []
        before = ""
        for text, target in pieces:
            first = self.text_ids if bos else self.ids
            added = self.ids_after(text, before) if before else first(text)
            ids += added
            is_target += [target] * len(added)
            before += text
        return ids, is_target

    def rendered(self, text: str, markers: tuple[str, str] | None = None) -> tuple[list[int], list[Span]]:
        """Encode a rendered conversation; return the ids and the span in `text` from which each comes.

        Special tokens between `markers` are encoded as text, as transformers does for
        `apply_chat_template(..., sanitize_control_tokens=True)`; the markers have no ids. Raises BadRowError when the
        tokenizer can encode such a text only as the special token.
        """
        if markers is None or not any(marker in text for marker in markers):
            encoding = self._backend.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        begin, end = map(re.escape, markers)
        tokens = self.special_pattern.pattern
        ids: list[int] = []
        spans: list[Span] = []
        position = 0
        for match in [*re.finditer(f"{begin}({tokens}){end}|{begin}|{end}", text), None]:
            plain = text[position : match.start() if match else len(text)]
            added, places = self._inner(plain) if position else self.rendered(plain)
            ids += added
            spans += [(position + first, position + last) for first, last in places]
            if match is not None and match[1] is not None:
                added = self._as_text(match[1])
                ids += added
                spans += [match.span(1)] * len(added)
            position = match.end() if match else len(text)
        return ids, spans

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Decode ids to text."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def groups(self, ids: Sequence[int], is_target: Sequence[bool]) -> list[Piece]:
        """Decode ids to pieces of text with the same `is_target`. Joined, the pieces are the text of all ids."""
        pieces: list[Piece] = []
        shown, begin = "", 0
        for end in range(1, len(ids) + 1):
            if end < len(ids) and is_target[end] == is_target[begin]:
                continue
            # Some decoders remove a leading blank, so a piece is the text that its ids add to the text before.
            text = self.decode(ids[:end])
            piece = text[len(shown) :] if text.startswith(shown) else self.decode(ids[begin:end])
            pieces.append((piece, bool(is_target[begin])))
            shown, begin = text, end
        return pieces

    def _inner(self, text: str) -> tuple[list[int], list[Span]]:
        """Encode a part of a text as it follows a line break; return its ids and places without the line break."""
        if not text:
            return [], []
        head = self.ids("\n")
        encoding = self._backend.encode("\n" + text, add_special_tokens=False)
        if encoding.ids[: len(head)] == head:
            return encoding.ids[len(head) :], [(max(0, a - 1), b - 1) for a, b in encoding.offsets[len(head) :]]
        return self.rendered(text)

    def _as_text(self, token: str) -> list[int]:
        """Encode the text of a special token as text. Raises BadRowError if the tokenizer gives the special token."""
        head = self._without_added("\n")
        ids = self._without_added("\n" + token)
        ids = ids[len(head) :] if ids[: len(head)] == head else self._without_added(token)
        if self._backend.token_to_id(token) in ids or not ids:
            raise BadRowError(
                f"'{token}' is written out in a text, but the tokenizer can encode it only as the special token"
            )
        return ids

    def _without_added(self, text: str) -> list[int]:
        """Encode a text by the tokenizer's model alone, without its added tokens."""
        with parsing(_unusable):
            if self._backend.normalizer is not None:
                text = self._backend.normalizer.normalize_str(text)
            splits = [text]
            if self._backend.pre_tokenizer is not None:
                splits = [split for split, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
            return [token.id for split in splits for token in self._backend.model.tokenize(split)]


def _unusable(cause: str) -> ConfigError:
    return ConfigError(f"the base's tokenizer.json cannot be used ({cause}); get the file again")
