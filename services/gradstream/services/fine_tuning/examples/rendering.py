"""Renders rows as examples: token ids, their targets, and for held-out examples the prompt of their test.

- prompt-completion: the ids of the prompt, of the completion, and end of text. Targets are the completion and the end.
- chat: the whole conversation by the chat template. Targets are the replies, each up to the token that ends it; end of
  text is appended only where the template ends the last reply with no special token.
- text: the document's ids and end of text. All are targets except the first, which has no token before it.

Rows of Alpaca (instruction, input, output) become conversations where the base has a chat template, and otherwise
prompts and completions in Alpaca's own words. The ids that a tokenizer puts before every text by default come first,
and only once; in a conversation the template writes them. An end of text that a row already has is not repeated.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradstream.core.errors import ConfigError
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig
from gradstream.services.fine_tuning.examples.chat import chat_prompt, chat_template, render_conversation
from gradstream.services.fine_tuning.examples.conversations import (
    REPLY_FIELDS,
    TRAIN_FIELDS,
    Conversation,
    completed_conversation,
    conversation,
)
from gradstream.services.fine_tuning.examples.encoding import Encoder
from gradstream.services.fine_tuning.examples.reading import (
    ALPACA_FIELDS,
    SHAREGPT_FIELD,
    BadRowError,
    Format,
    Row,
    shortened,
)

MESSAGE_FIELDS = {"role", *REPLY_FIELDS, *TRAIN_FIELDS}
ALPACA_PROMPTS = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
)
"""The prompts with an input and without: Taori et al., "Stanford Alpaca", 2023."""
Completion = tuple[int | tuple[int, ...], str, str]
"""The prompt's ids, or their number if the example begins with them; the prompt and the completion as text."""


class Prompt(NamedTuple):
    """A held-out prompt: the model's input as ids and as text, and the completion of the example."""

    ids: tuple[int, ...]
    text: str
    expected: str


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A training example: n ids, some of them targets. It takes n - 1 places in a row.

    `key`: hash of the row's content, independent of the row's position.
    """

    origin: str
    key: bytes
    ids: npt.NDArray[np.uint32]
    is_target: npt.NDArray[np.bool_]
    completion: Completion | None = None
    """None where the example has no completion, or only a part of it."""

    @property
    def num_places(self) -> int:
        """Number of input tokens: the last id is a target only."""
        return len(self.ids) - 1

    @property
    def num_targets(self) -> int:
        """Number of tokens that count in the loss."""
        return int(self.is_target.sum())

    @property
    def prompt(self) -> Prompt | None:
        """The prompt with which a model is tested on this example; None if there is none."""
        if self.completion is None:
            return None
        prompt, text, expected = self.completion
        return Prompt(prompt if isinstance(prompt, tuple) else tuple(self.ids[:prompt].tolist()), text, expected)

    def truncated(self, num_places: int) -> Example | None:
        """The first `num_places` input tokens of the example; None when they have no target."""
        ids, is_target = self.ids[: num_places + 1], self.is_target[: num_places + 1]
        return Example(self.origin, self.key, ids, is_target) if is_target.any() else None


class Renderer:
    """Renders rows of one format, and counts their unused fields. Raises ConfigError if the tokenizer is unsuitable.

    `format` is the format of the examples; for rows of Alpaca it depends on the tokenizer. `unused_fields`: for each
    field that no example was made of, in how many rows it is not null. `notes`: messages for people, with counts.
    """

    def __init__(self, config: ExamplesConfig, tokenizer: Any, encoder: Encoder, fmt: Format, row_length: int):
        self._config = config
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._row_length = row_length
        self._template = ""
        if fmt == "chat":
            self._template = chat_template(tokenizer)
        elif fmt == "alpaca":
            try:
                self._template = chat_template(tokenizer)
            except ConfigError:
                pass
        self.format = fmt if fmt != "alpaca" else "chat" if self._template else "prompt-completion"
        self.unused_fields: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        render = {
            "prompt-completion": self._prompt_completion,
            "chat": self._chat,
            "text": self._document,
            "alpaca": self._alpaca,
        }
        self._render = render[fmt]
        used: dict[Format, set[str]] = {
            "prompt-completion": {config.prompt_field, config.completion_field},
            "chat": {"tools"},  # and the fields that `_told_in` returns
            "text": {config.text_field},
            "alpaca": set(ALPACA_FIELDS),
        }
        self._used = used[fmt]

    def render(self, row: Row) -> list[Example]:
        """Render the examples of a row: one, or for a text one for each row that it fills. Raises BadRowError."""
        if row.reason:
            raise BadRowError(row.reason)
        for field in TRAIN_FIELDS:
            if field not in self._used and row.values.get(field) is not None and row.values[field] != 1:
                raise BadRowError(
                    f"field '{field}' is {shortened(repr(row.values[field]))}, but no such field can exclude or "
                    f"weight a row; leave out the row or the field"
                )
        examples = self._render(row)
        self.unused_fields.update(row.unread)
        used = {*self._used, *TRAIN_FIELDS, *(self._told_in(row) if self._render == self._chat else ())}
        used |= {field.split(".")[0] for field in used}  # for "meta.text" the whole field "meta"
        for field, value in row.values.items():
            if value is not None and field not in used:
                self.unused_fields[field] += 1
        return examples

    def _prompt_completion(self, row: Row) -> list[Example]:
        prompt, completion = row.text(self._config.prompt_field), row.text(self._config.completion_field)
        return [self._completed(row, prompt, completion)]

    def _completed(self, row: Row, prompt: str, completion: str) -> Example:
        if not completion.strip():
            raise BadRowError("the completion is empty")
        if not prompt and not self._encoder.begin_ids:
            raise BadRowError("the prompt is empty, so nothing comes before the completion; use data.format text")
        before = self._encoder.text_ids(prompt)
        after = self._encoder.ids_after(completion, prompt)
        if not prompt and tuple(after[: len(before)]) == self._encoder.begin_ids:
            after = after[len(before) :]
        if not after:
            raise BadRowError("the completion has no tokens")
        ends = [number for number, token in enumerate(after) if token in self._encoder.end_ids]
        if ends and ends[0] < len(after) - 1 and self._encoder.decode(after[ends[0] + 1 :]).strip():
            end = self._encoder.decode([after[ends[0]]])
            raise BadRowError(
                f"the completion has '{end}', which ends a text, before its end: what follows would never be "
                f"generated; write the row as messages, or take it out"
            )
        # Text after an end that is written out, usually a line break, is never generated.
        after = after[: ends[0] + 1] if ends else [*after, self._encoder.end_of_text_id]
        self._note_special(prompt + completion)
        is_target = [False] * len(before) + [True] * len(after)
        parts = ["prompt-completion", prompt, completion]
        return _example(row.origin, parts, before + after, is_target, (len(before), prompt, completion))

    def _chat(self, row: Row) -> list[Example]:
        field, *others = self._told_in(row)
        tools = row.values.get("tools")
        if others == ["system"]:
            told = conversation(row.value(field), tools, row.values.get("system"))
            self.notes[f"rows of ShareGPT ({SHAREGPT_FIELD}, from, value), read as messages"] += 1
        elif others:
            told = completed_conversation(row.value(field), row.value(others[0]), tools)
            self.notes[f"rows of messages in {field} and {others[0]}, of which the latter are trained on"] += 1
        else:
            told = conversation(row.value(field), tools)
        return [self._conversed(row, told, others[0] if others and others != ["system"] else field)]

    def _told_in(self, row: Row) -> tuple[str, ...]:
        """The fields of a row that contain its conversation.

        These are the field of messages, ShareGPT's fields, or prompt and completion if they are lists of messages.
        """
        config = self._config
        if row.says(config.messages_field):
            return (config.messages_field,)
        if row.says(SHAREGPT_FIELD):
            return (SHAREGPT_FIELD, "system")
        both = (config.prompt_field, config.completion_field)
        if any(row.says(field) and isinstance(row.value(field), list) for field in both):
            return both
        return (config.messages_field,)

    def _conversed(self, row: Row, told: Conversation, field: str) -> Example:
        rendered = render_conversation(told, self._tokenizer, self._encoder)
        prompt_ids, prompt = chat_prompt(told.before(told.last_trained), self._tokenizer, self._encoder)
        if not rendered.reply_begin or not prompt_ids:
            raise BadRowError("the chat template puts nothing before the first reply")
        if rendered.is_end_appended:
            end = self._encoder.decode([self._encoder.end_of_text_id])
            self.notes[f"conversations end with no end of text by the chat template; '{end}' is added"] += 1
        unknown = {key for message in told.messages for key in message} - MESSAGE_FIELDS
        for key in sorted(unknown):
            if key not in self._template:
                self.unused_fields[f"{field}[].{key}"] += 1
        ids = rendered.ids
        num_prompt = len(prompt_ids)
        is_begin = ids[:num_prompt] == prompt_ids
        begin = num_prompt if is_begin else rendered.reply_begin
        replied = [token for token, is_target in zip(ids[begin:], rendered.is_target[begin:], strict=True) if is_target]
        completion = self._encoder.decode(replied, skip_special_tokens=True)
        parts = ["chat", json.dumps([told.messages, told.is_trained, told.tools], sort_keys=True, default=str)]
        tested = (num_prompt if is_begin else tuple(prompt_ids), prompt, completion)
        return _example(row.origin, parts, ids, rendered.is_target, tested)

    def _alpaca(self, row: Row) -> list[Example]:
        instruction, output = row.text("instruction"), row.text("output")
        more = row.text("input") if row.values.get("input") is not None else ""
        self.notes["rows of Alpaca (instruction, input, output)"] += 1
        if not self._template:
            for field in ("system", "history"):
                if row.values.get(field):
                    raise BadRowError(f"field '{field}' of a row of Alpaca needs a base with a chat template")
            with_input, without = ALPACA_PROMPTS
            prompt = (with_input if more else without).format(instruction=instruction, input=more)
            return [self._completed(row, prompt, output)]
        if not output.strip():
            raise BadRowError("the output is empty")
        history = row.values.get("history") or []
        if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
            raise BadRowError("field 'history' is not a list of pairs of instruction and output")
        turns = [*history, ["\n".join(text for text in (instruction, more) if text), output]]
        messages = [
            {"role": role, "content": text, "weight": int(number == len(turns) - 1) if role == "assistant" else None}
            for number, turn in enumerate(turns)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return [self._conversed(row, conversation(messages, None, row.values.get("system")), "messages")]

    def _note_special(self, text: str) -> None:
        if self._encoder.special_pattern.search(text):
            self.notes["rows have special tokens written out, which are read as those tokens"] += 1

    def _document(self, row: Row) -> list[Example]:
        """Split a document into consecutive parts of a row's length.

        Parts overlap by one token, so each token but the first is a target exactly once.
        """
        text = row.text(self._config.text_field)
        if not text.strip():
            raise BadRowError("the text is empty")
        ids = self._encoder.text_ids(text)
        if ids and ids[-1] not in self._encoder.end_ids:
            ids.append(self._encoder.end_of_text_id)
        self._note_special(text)
        if len(ids) < 2:
            raise BadRowError("the text has no tokens")
        examples = []
        for begin in range(0, len(ids) - 1, self._row_length):
            part = ids[begin : begin + self._row_length + 1]
            origin = row.origin if not begin else f"{row.origin} (from token {begin + 1})"
            # The key is the hash of the part: parts of one long document may be in both splits, but each part in one.
            examples.append(_example(origin, ["text", *map(str, part)], part, [True] * len(part), None))
        return examples


def _example(
    origin: str,
    parts: list[str],
    ids: list[int],
    is_target: list[bool],
    completion: tuple[int | tuple[int, ...], str, str] | None,
) -> Example:
    marks = np.array(is_target, np.bool_)
    marks[0] = False  # the first token has no input before it
    if not marks.any():
        raise BadRowError("no token is a target")
    key = blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return Example(origin, key, np.array(ids, np.uint32), marks, completion)
