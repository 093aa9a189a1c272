"""Renders conversations to token ids with the tokenizer's chat template, and marks the ids of the assistant's replies.

The ids are those of transformers' `apply_chat_template` of the whole conversation. A template with `{% generation %}`
marks the replies itself. With any other template, two renderings locate a reply. It begins where the rendering of the
messages before it, with the prompt for a reply, ends. It ends where the rendering of the messages up to and with the
reply ends. The text of a message is never markup: a special token that is written out in it is encoded as text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradstream.core.errors import ConfigError, one_line
from gradstream.services.fine_tuning.examples.conversations import (
    REASONING_FIELDS,
    REPLY_FIELDS,
    ROLES,
    Conversation,
    joined,
    strings,
)
from gradstream.services.fine_tuning.examples.encoding import Encoder, Span
from gradstream.services.fine_tuning.examples.reading import BadRowError, shortened

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Unicode's noncharacters, which texts do not use. If a text has one, another pair is taken.
MARKERS = tuple((chr(code), chr(code + 1)) for code in range(0xFDD0, 0xFDEE, 2))
NOTHING = re.compile("(?!)")
CONTENT_MARK = "\ufdef"


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation rendered for training: n ids, and which of them are targets."""

    ids: list[int]
    is_target: list[bool]
    reply_begin: int
    """The number of the first id of the last reply that is trained on."""
    is_end_appended: bool
    """Whether end of text was appended, because the template does not end replies with a token that ends a text."""


def chat_template(tokenizer: Any, tools: list[dict[str, Any]] | None = None) -> str:
    """The tokenizer's chat template. Raises ConfigError when there is none, or none that is a valid jinja template."""
    try:
        template = tokenizer.get_chat_template(None, tools)
    except ValueError:  # none, or several and none of them the default
        raise ConfigError(
            "the base's tokenizer has no chat template, so messages cannot be rendered; put a chat_template.jinja "
            "beside its tokenizer.json, or write the rows as prompt and completion"
        ) from None
    _check_syntax(str(template))
    return str(template)


@functools.lru_cache(maxsize=64)
def _check_syntax(template: str) -> None:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the base's chat template is not valid ({one_line(error)}); correct its chat_template.jinja"
        ) from None
    except Exception:  # the template may refuse only this conversation
        pass


def render_chat(messages: Sequence[dict[str, Any]], tokenizer: Any, add_generation_prompt: bool) -> str:
    """Render a conversation as text, with the beginning of a reply if `add_generation_prompt`.

    Raises ConfigError when there is no chat template, or when the template refuses the conversation.
    """
    template = _Template(tokenizer, Conversation(list(messages)), NOTHING)
    try:
        return template.render(add_generation_prompt=add_generation_prompt)
    except BadRowError as error:
        raise ConfigError(f"{error}; change the messages") from None


def chat_prompt_ids(
    messages: Sequence[dict[str, Any]],
    tokenizer: Any,
    encoder: Encoder | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Render a conversation as the ids of `apply_chat_template` with the prompt for a reply, for the model to continue.

    Raises ConfigError as `render_chat` does.
    """
    try:
        return chat_prompt(Conversation(list(messages), tools=tools), tokenizer, encoder or Encoder(tokenizer))[0]
    except BadRowError as error:
        raise ConfigError(f"{error}; change the messages") from None


def chat_prompt(conversation: Conversation, tokenizer: Any, encoder: Encoder) -> tuple[list[int], str]:
    """Render a conversation with the prompt for a reply, as ids and as text for people.

    Raises BadRowError when the template refuses the conversation.
    """
    template = _Template(tokenizer, conversation, encoder.special_pattern)
    text = template.render(add_generation_prompt=True)
    ids, _ = encoder.rendered(text, template.markers)
    return ids, text.translate(dict.fromkeys(map(ord, template.markers or ())))


def render_conversation(conversation: Conversation, tokenizer: Any, encoder: Encoder) -> RenderedChat:
    """Render a conversation that has a reply to train on, as ids with their targets.

    In each reply that is trained on, the targets go up to and with the first token that ends a text, so that the model
    learns to stop. Where the last reply has no such token, end of text is appended. Raises BadRowError when the
    template refuses the conversation, leaves a part of it out, or gives no way to locate the replies.
    """
    template = _Template(tokenizer, conversation, encoder.special_pattern)
    text, marks = template.render_marked()
    template.check_complete(text)
    marked = bool(GENERATION.search(template.source))
    spans = template.marked_replies(marks) if marked else template.replies(text)
    ids, places = encoder.rendered(text, template.markers)
    is_target = [False] * len(ids)
    reply_begin, is_ended = 0, False
    for span in spans:
        numbers = [number for number, place in enumerate(places) if _overlap(place, span)]
        if not numbers:
            continue
        ends = [number for number in numbers if ids[number] in encoder.end_ids]
        if not marked and ends:
            # Where a template writes several ends in a row, all are targets: a service may stop at any of them.
            last = next(number for number in ends if number + 1 not in ends)
            numbers = [number for number in numbers if number <= last]
        following = numbers[-1] + 1
        if not ends and following < len(ids) and ids[following] in encoder.end_ids:
            # A template may mark a reply without its end, or end it with the token that begins the next message.
            ends = [following]
            numbers.append(following)
        reply_begin, is_ended = numbers[0], bool(ends)
        for number in numbers:
            is_target[number] = True
    is_end_appended = not is_ended and conversation.last_trained == len(conversation.messages) - 1
    if is_end_appended:
        # The text that the template puts after the reply is a target too, so the model learns to stop after it.
        is_target[reply_begin:] = [True] * (len(ids) - reply_begin)
        ids, is_target = [*ids, encoder.end_of_text_id], [*is_target, True]
    return RenderedChat(ids, is_target, reply_begin, is_end_appended)


class _Template:
    """A chat template and a conversation, with `markers` around special tokens that are written out in its texts."""

    def __init__(self, tokenizer: Any, conversation: Conversation, special: re.Pattern[str]):
        """Raises ConfigError without a template, and BadRowError when a special token is a key of an object."""
        self._tokenizer = tokenizer
        self.source = chat_template(tokenizer, conversation.tools)
        self.markers: tuple[str, str] | None = None
        self._check_roles(conversation)
        self._special = special
        texts = [*strings(conversation.messages), *strings(conversation.tools)]
        if found := next((match[0] for text, is_key in texts if is_key and (match := special.search(text))), None):
            raise BadRowError(f"the name of a field has the special token '{found}' in it")
        if any(special.search(text) for text, _ in texts):
            self.markers = _unused_markers(texts)
            conversation = _marked(conversation, special, self.markers)
        self._conversation = self._with_content(conversation)

    def render(self, conversation: Conversation | None = None, add_generation_prompt: bool = False) -> str:
        """Render the conversation, or another one, as text. Raises BadRowError when the template refuses it."""
        return self._render(conversation or self._conversation, add_generation_prompt, False)[0]

    def render_marked(self) -> tuple[str, list[Span]]:
        """Render the conversation as text; return it with the spans that `{% generation %}` marks in it."""
        return self._render(self._conversation, False, bool(GENERATION.search(self.source)))

    def check_complete(self, text: str) -> None:
        """Raise BadRowError when the template has left a message, tools, calls or reasoning out of `text`."""
        conversation = self._conversation
        for number, message in enumerate(conversation.messages):
            content = joined(message).get("content", "").strip()
            # Templates leave out messages of unknown roles, and such a message's text may be part of another message.
            is_suspect = message["role"] not in ("user", "assistant") or content not in text
            if content and is_suspect and self._ignores(text, number, "content"):
                raise BadRowError(
                    f"the chat template writes nothing of message {number + 1} ({message['role']}); take the message "
                    f"out, or use a template that writes it"
                )
            if "tool_calls" in message and self._ignores(text, number, "tool_calls"):
                raise BadRowError(_left_out(f"tool_calls of message {number + 1}"))
        reasons = [n for n, message in enumerate(conversation.messages) if any(f in message for f in REASONING_FIELDS)]
        # A template may leave out the reasoning of earlier turns, but not all reasoning.
        if reasons:
            plain = [_without(message, REASONING_FIELDS) for message in conversation.messages]
            if self._same(text, replace(conversation, messages=plain)):
                field = next(field for field in REASONING_FIELDS if field in conversation.messages[reasons[0]])
                raise BadRowError(_left_out(f"{field} of message {reasons[0] + 1}"))
        if conversation.tools and self._same(text, replace(conversation, tools=None)):
            raise BadRowError(_left_out("field 'tools'"))

    def marked_replies(self, marks: Sequence[Span]) -> list[Span]:
        """Select the marks of `{% generation %}` that belong to replies that are trained on. Raises BadRowError."""
        trained = [t for t, m in zip(self._trained, self._messages, strict=True) if m["role"] == "assistant"]
        if not marks:
            raise BadRowError("the chat template marks nothing of this conversation as a reply")
        if all(trained):
            return list(marks)
        if len(marks) != len(trained):
            raise BadRowError(
                f"the chat template marks {len(marks)} parts of {len(trained)} replies, so those that are not trained "
                f"on cannot be distinguished from the others"
            )
        return [mark for mark, is_trained in zip(marks, trained, strict=True) if is_trained]

    def replies(self, text: str) -> list[Span]:
        """Find the spans in `text` of the replies that are trained on. Raises BadRowError."""
        return [self._reply(number, text) for number, is_trained in enumerate(self._trained) if is_trained]

    @property
    def _messages(self) -> list[dict[str, Any]]:
        return self._conversation.messages

    @property
    def _trained(self) -> tuple[bool, ...]:
        return self._conversation.is_trained

    def _reply(self, number: int, text: str) -> Span:
        earlier = self._conversation.before(number)
        before = self.render(earlier, add_generation_prompt=True)
        begin = len(before)
        if not text.startswith(before):
            # The prompt for a reply may contain the reply's beginning, as for models that reason before they answer.
            begin = _num_common(before, text, self._with_mark(number))
            if not text.startswith(self.render(earlier)):
                raise BadRowError(_rewritten(number))
        after = self.render(self._conversation.before(number + 1))
        if text.startswith(after) and len(after) > begin:
            return begin, len(after)
        # A template may write a reply differently once a later message follows. Then the special token after the reply
        # marks its end.
        end = self._end_after_content(number, text)
        if end <= begin:
            raise BadRowError(_rewritten(number))
        return begin, end

    def _end_after_content(self, number: int, text: str) -> int:
        """The end of the special token that follows a reply's content; -1 where there is none."""
        message = self._messages[number]
        other = self._with_mark(number)
        if "content" not in message or "tool_calls" in message or other.count(CONTENT_MARK) != 1:
            return -1
        after = other.split(CONTENT_MARK)[1]
        if not text.endswith(after):
            return -1
        match = re.compile(rf"\s*({self._special.pattern})").match(text, len(text) - len(after))
        return match.end() if match else -1

    def _with_mark(self, number: int) -> str:
        """Render the conversation with a mark in place of a message's content."""
        messages = list(self._messages)
        messages[number] = {**messages[number], "content": CONTENT_MARK}
        return self.render(replace(self._conversation, messages=messages))

    def _check_roles(self, conversation: Conversation) -> None:
        for number, message in enumerate(conversation.messages, 1):
            role = message["role"]
            if role not in ROLES and f"'{role}'" not in self.source and f'"{role}"' not in self.source:
                raise BadRowError(
                    f"message {number} has the unknown role '{shortened(role)}'; roles are {', '.join(ROLES)}"
                )

    def _with_content(self, conversation: Conversation) -> Conversation:
        """Join contents that are lists of parts into one text, if the template cannot take lists."""
        lists = [message for message in conversation.messages if isinstance(message.get("content"), list)]
        if not lists:
            return conversation
        try:
            text = self.render(conversation)
            parts = [part for message in lists for part in message["content"]]
            if all(part["text"].strip() in text for part in parts) and not any(str(part) in text for part in parts):
                return conversation
        except BadRowError:
            pass
        return replace(conversation, messages=[joined(message) for message in conversation.messages])

    def _ignores(self, text: str, number: int, field: str) -> bool:
        """Return whether the rendering stays the same without a field of a message, or with another content."""
        messages = list(self._messages)
        message = messages[number]
        messages[number] = {**message, "content": CONTENT_MARK} if field == "content" else _without(message, (field,))
        if field != "content" and not any(name in messages[number] for name in REPLY_FIELDS):
            messages[number] = {**messages[number], "content": ""}
        return self._same(text, replace(self._conversation, messages=messages))

    def _same(self, text: str, other: Conversation) -> bool:
        try:
            return self.render(other) == text
        except BadRowError:  # the template needs the removed part
            return False

    def _render(self, conversation: Conversation, add_generation_prompt: bool, marks: bool) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [[dict(message) for message in conversation.messages]],
                tools=conversation.tools,
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template is a program of its own
            reason = shortened(one_line(error), 200)
            raise BadRowError(f"the chat template refuses the conversation ({reason})") from None
        return str(texts[0]), [(begin, end) for begin, end in (spans[0] if spans else []) if end > begin]


def _num_common(*texts: str) -> int:
    """The number of leading characters that all texts have in common."""
    shortest = min(map(len, texts))
    return next((at for at in range(shortest) if len({text[at] for text in texts}) > 1), shortest)


def _overlap(place: Span, span: Span) -> bool:
    """Return whether a token at `place` overlaps `span`. A token without characters counts at its position."""
    begin, end = place
    return span[0] <= begin < span[1] if begin == end else begin < span[1] and end > span[0]


def _unused_markers(texts: Sequence[tuple[str, bool]]) -> tuple[str, str]:
    everything = "".join(text for text, _ in texts)
    for pair in MARKERS:
        if not any(marker in everything for marker in pair):
            return pair
    raise BadRowError("a special token is written out in a text that has all of Unicode's noncharacters")


def _marked(conversation: Conversation, pattern: re.Pattern[str], markers: tuple[str, str]) -> Conversation:
    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: match[0].join(markers), value)
        if isinstance(value, dict):
            return {key: marked(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [marked(entry) for entry in value]
        return value

    messages = [{**marked(message), "role": message["role"]} for message in conversation.messages]
    return replace(conversation, messages=messages, tools=marked(conversation.tools))


def _without(message: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in fields}


def _left_out(what: str) -> str:
    return f"the chat template writes nothing of {what}; take it out of the row, or use a template that writes it"


def _rewritten(number: int) -> str:
    return (
        f"the chat template renders the conversation up to message {number + 1} differently than as a part of the "
        f"whole, so the reply cannot be located; use a template with {{% generation %}} or conversations "
        f"with one reply"
    )
