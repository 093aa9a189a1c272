"""Text to token ids and back, so that what is trained on and what is generated from have the same boundaries.

A text is encoded in pieces: the prompt and the completion, the messages and the replies between them. No token spans
two pieces, so which tokens are targets is exact, and a prompt's ids are the same with a completion after it as without
one. Special tokens that are written out in a text are those tokens, as chat templates need.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gradstream.core.errors import ConfigError
from gradstream.core.foreign import Guarded, parsing

Piece = tuple[str, bool]
"""Text, and whether its tokens are targets."""
# Put before a piece and taken off again, where a tokenizer writes a blank before every text it is given.
SENTINELS = ("\n", "|", "0")


class Encoder:
    """A tokenizer as the examples need it.

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
        # A copy: truncation and padding, which a tokenizer.json may ask for, must not happen here.
        with parsing(_unusable):
            self._backend: Any = Guarded(Tokenizer.from_str(backend.to_str()), _unusable)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.content: bytes = self._backend.to_str(pretty=True).encode("utf-8")
        """The tokenizer.json."""
        self.end_of_text_id = int(tokenizer.eos_token_id)
        with parsing(_unusable):
            num_known, first = len(tokenizer), tokenizer("x").input_ids[:1]
        self.vocab_size = max(num_known, 1 + max(self._backend.get_vocab(with_added_tokens=True).values()))
        self.bos_id = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
        """What the tokenizer puts before every text; None for those that put nothing."""
        self._adds_blank = self.decode(self.ids("x") + self.ids("x")) != "xx"

    def ids(self, text: str) -> list[int]:
        """The ids of a text that stands at the beginning, without bos."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def ids_after(self, text: str) -> list[int]:
        """The ids of a text that follows another one: without the blank that some tokenizers begin with."""
        if self._adds_blank:
            for sentinel in SENTINELS:
                head, whole = self.ids(sentinel), self.ids(sentinel + text)
                if whole[: len(head)] == head:
                    return whole[len(head) :]
        return self.ids(text)

    def pieces(self, pieces: Iterable[Piece], bos: bool) -> tuple[list[int], list[bool]]:
        """The ids of all pieces and whether each is a target; `bos`: begin as the tokenizer does by default."""
        ids: list[int] = [self.bos_id] if bos and self.bos_id is not None else []
        is_target = [False] * len(ids)
        begun = False
        for text, target in pieces:
            if text:
                added = self.ids_after(text) if begun else self.ids(text)
                ids += added
                is_target += [target] * len(added)
                begun = True
        return ids, is_target

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def groups(self, ids: Sequence[int], is_target: Sequence[bool]) -> list[Piece]:
        """The text of ids in pieces of the same `is_target`. Together the pieces are the text of all ids."""
        pieces: list[Piece] = []
        shown, begin = "", 0
        for end in range(1, len(ids) + 1):
            if end < len(ids) and is_target[end] == is_target[begin]:
                continue
            # Some decoders take a blank off the beginning, so a piece is what it adds to the text before it.
            text = self.decode(ids[:end])
            piece = text[len(shown) :] if text.startswith(shown) else self.decode(ids[begin:end])
            pieces.append((piece, bool(is_target[begin])))
            shown, begin = text, end
        return pieces


def _unusable(cause: str) -> ConfigError:
    return ConfigError(f"the base's tokenizer.json cannot be used ({cause}); get the file again")
