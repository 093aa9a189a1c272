"""From a row to examples: token ids, which of them are targets, and the prompt that a held-out one is tested with.

- prompt-completion: the prompt's ids, the completion's, end of text. Targets are the completion and the end.
- chat: the conversation by the chat template, up to its last reply. Targets are the replies and, after the last one,
  the end of text, which is appended where the template has none.
- text: the document's ids and end of text, all of them targets but the first, which nothing comes before.

A tokenizer's bos comes first where it puts one there by default; in a conversation where the template writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradstream.core.finetuning_recipe import ExamplesConfig
from gradstream.services.fine_tuning.chat import chat_pieces, chat_template, check_messages
from gradstream.services.fine_tuning.encoding import Encoder
from gradstream.services.fine_tuning.reading import BadRowError, Format, Row


class Prompt(NamedTuple):
    """A held-out prompt: what the model is given, as ids and as text, and the completion of the example."""

    ids: tuple[int, ...]
    text: str
    expected: str


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """What is trained on: n ids, of which those marked are targets. It takes n - 1 places in a row.

    `key`: hash of what the row says, the same for the same row wherever it stands.
    """

    origin: str
    key: bytes
    ids: npt.NDArray[np.uint32]
    is_target: npt.NDArray[np.bool_]
    completion: tuple[int, str, str] | None = None
    """Ids before the completion, the prompt and the completion as text; None where there is none, or not all of it."""

    @property
    def num_places(self) -> int:
        """Input tokens: the last id is a target only."""
        return len(self.ids) - 1

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return int(self.is_target.sum())

    @property
    def prompt(self) -> Prompt | None:
        """What a model is tested for with this example."""
        if self.completion is None:
            return None
        num_ids, text, expected = self.completion
        return Prompt(tuple(self.ids[:num_ids].tolist()), text, expected)

    def truncated(self, num_places: int) -> Example | None:
        """The beginning of the example; None when no target is left in it."""
        ids, is_target = self.ids[: num_places + 1], self.is_target[: num_places + 1]
        return Example(self.origin, self.key, ids, is_target) if is_target.any() else None


class Renderer:
    """Renders rows of one format. Raises ConfigError when the tokenizer cannot."""

    def __init__(self, config: ExamplesConfig, tokenizer: Any, encoder: Encoder, fmt: Format, row_length: int):
        self._config = config
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._row_length = row_length
        self._template = chat_template(tokenizer) if fmt == "chat" else ""
        self._render = {"prompt-completion": self._completion, "chat": self._chat, "text": self._document}[fmt]

    def render(self, row: Row) -> list[Example]:
        """The examples of a row: one, but of a text as many as it fills rows. Raises BadRowError."""
        if row.reason:
            raise BadRowError(row.reason)
        return self._render(row)

    def _completion(self, row: Row) -> list[Example]:
        prompt, completion = row.text(self._config.prompt_field), row.text(self._config.completion_field)
        if not completion.strip():
            raise BadRowError("the completion is empty")
        if not prompt and self._encoder.bos_id is None:
            raise BadRowError("the prompt is empty, so nothing comes before the completion; use data.format text")
        before, _ = self._encoder.pieces([(prompt, False)], bos=True)
        after = self._encoder.ids_after(completion) if prompt else self._encoder.ids(completion)
        if not after:
            raise BadRowError("the completion has no tokens")
        if after[-1] != self._encoder.end_of_text_id:
            after = [*after, self._encoder.end_of_text_id]
        is_target = [False] * len(before) + [True] * len(after)
        parts = ["prompt-completion", prompt, completion]
        return [_example(row.origin, parts, before + after, is_target, (len(before), prompt, completion))]

    def _chat(self, row: Row) -> list[Example]:
        messages = check_messages(row.value(self._config.messages_field))
        pieces = chat_pieces(messages, self._tokenizer, self._template)
        ids, is_target = self._encoder.pieces(pieces, bos=False)
        begin = len(self._encoder.pieces(pieces[:-1], bos=False)[0])
        end_of_text_id = self._encoder.end_of_text_id
        if end_of_text_id in ids[begin:]:
            # What follows it, most often a line break, is never generated.
            end = ids.index(end_of_text_id, begin) + 1
            ids, is_target = ids[:end], is_target[:end]
        else:
            ids, is_target = [*ids, end_of_text_id], [*is_target, True]
        if begin == 0:
            raise BadRowError("the chat template puts nothing before the first reply")
        prompt = "".join(text for text, _ in pieces[:-1])
        completion = self._encoder.decode(ids[begin:], skip_special_tokens=True)
        parts = ["chat", *(part for message in messages for part in (message["role"], message["content"]))]
        return [_example(row.origin, parts, ids, is_target, (begin, prompt, completion))]

    def _document(self, row: Row) -> list[Example]:
        """Consecutive parts of a row's length. They overlap in one token, so that each is a target once."""
        text = row.text(self._config.text_field)
        if not text.strip():
            raise BadRowError("the text is empty")
        ids, _ = self._encoder.pieces([(text, True)], bos=True)
        ids.append(self._encoder.end_of_text_id)
        if len(ids) < 2:
            raise BadRowError("the text has no tokens")
        examples = []
        for begin in range(0, len(ids) - 1, self._row_length):
            part = ids[begin : begin + self._row_length + 1]
            origin = row.origin if not begin else f"{row.origin} (from token {begin + 1})"
            # By its own content: a long document is on both sides of the split, but no part of it is.
            examples.append(_example(origin, ["text", *map(str, part)], part, [True] * len(part), None))
        return examples


def _example(
    origin: str, parts: list[str], ids: list[int], is_target: list[bool], completion: tuple[int, str, str] | None
) -> Example:
    marks = np.array(is_target, np.bool_)
    marks[0] = False  # nothing comes before it
    if not marks.any():
        raise BadRowError("no token is a target")
    key = blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return Example(origin, key, np.array(ids, np.uint32), marks, completion)
