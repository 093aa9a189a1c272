"""Conversations to text, by the tokenizer's chat template, and which of it the assistant has written.

A template with `{% generation %}` says so itself. For any other, a reply is what rendering the conversation up to and
with it adds to rendering it up to it with the prompt for a reply, which is also what the model will have before it
when it generates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gradstream.core.errors import ConfigError, one_line
from gradstream.services.fine_tuning.encoding import Encoder, Piece
from gradstream.services.fine_tuning.reading import BadRowError, checked_text, shortened, type_name

ROLES = ("system", "user", "assistant")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = Sequence[Mapping[str, str]]


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template. Raises ConfigError when it has none, or one that is no jinja template."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # none, or several and none of them the default
        raise ConfigError(
            "the base's tokenizer has no chat template, so messages cannot be rendered; put a chat_template.jinja "
            "beside its tokenizer.json, or write the rows as prompt and completion"
        ) from None
    try:
        render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the base's chat template is not valid ({one_line(error)}); correct its chat_template.jinja"
        ) from None
    except Exception:  # it may refuse this conversation, and not the next
        pass
    return str(template)


def check_messages(value: object) -> list[dict[str, str]]:
    """The messages of a row, up to its last reply: what follows that teaches nothing.

    Raises BadRowError.
    """
    if not isinstance(value, list):
        raise BadRowError(f"the messages are {type_name(value)}, not a list")
    messages: list[dict[str, str]] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise BadRowError(f"message {number} is {type_name(message)}, not an object with role and content")
        for key in ("role", "content"):
            if key not in message:
                raise BadRowError(f"message {number} has no '{key}'")
            if not isinstance(message[key], str):
                raise BadRowError(f"message {number}: its {key} is {type_name(message[key])}, not text")
        if message["role"] not in ROLES:
            raise BadRowError(
                f"message {number} has the unknown role '{shortened(message['role'])}'; roles are {', '.join(ROLES)}"
            )
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadRowError(f"message {number}, a reply, is empty")
        content = checked_text(message["content"], f"message {number}")
        messages.append({"role": message["role"], "content": content})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise BadRowError("no assistant message, so there is nothing to learn")
    return messages


def render_chat(messages: Messages, tokenizer: Any, add_generation_prompt: bool) -> str:
    """A conversation as text, with the beginning of a reply if `add_generation_prompt`.

    Raises ConfigError when there is no chat template, and when it refuses the conversation.
    """
    try:
        return _render(messages, tokenizer, chat_template(tokenizer), add_generation_prompt)[0]
    except BadRowError as error:
        raise ConfigError(f"{error}; change the messages") from None


def chat_prompt_ids(messages: Messages, tokenizer: Any, encoder: Encoder | None = None) -> list[int]:
    """The ids after which the model writes its reply: the same as an example with that reply begins with.

    Raises ConfigError as `render_chat` does.
    """
    encoder = encoder or Encoder(tokenizer)
    template = chat_template(tokenizer)
    try:
        text, spans = _render(messages, tokenizer, template, add_generation_prompt=True)
    except BadRowError as error:
        raise ConfigError(f"{error}; change the messages") from None
    if not GENERATION.search(template):
        try:
            spans = _reply_spans(messages, text, tokenizer, template)
        except BadRowError:  # then no example was made of such a conversation: nothing to agree with
            spans = []
    return encoder.pieces(_cut(text, spans), bos=False)[0]


def chat_pieces(messages: Messages, tokenizer: Any, template: str) -> list[Piece]:
    """A conversation that ends with a reply, as text with its replies marked as targets.

    What the template puts after the last reply is a target too: the model has to learn to stop. Raises BadRowError
    when the template refuses the conversation or hides where the replies are.
    """
    text, spans = _render(messages, tokenizer, template, add_generation_prompt=False)
    if not GENERATION.search(template):
        spans = _reply_spans(messages, text, tokenizer, template)
    if not spans:
        raise BadRowError("the chat template marks nothing of this conversation as a reply")
    spans = [*spans[:-1], (spans[-1][0], len(text))]
    return _cut(text, spans)


def _reply_spans(messages: Messages, text: str, tokenizer: Any, template: str) -> list[tuple[int, int]]:
    """Where in `text`, the rendering of `messages`, the replies begin and end."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:number], tokenizer, template, add_generation_prompt=True)[0]
        after = _render(messages[: number + 1], tokenizer, template, add_generation_prompt=False)[0]
        if not text.startswith(after) or not after.startswith(before) or after == before:
            raise BadRowError(
                f"the chat template renders the conversation up to message {number + 1} differently than as a part of "
                f"the whole, so the reply cannot be told from the rest; use a template with {{% generation %}} or "
                f"conversations with one reply"
            )
        spans.append((len(before), len(after)))
    return spans


def _render(
    messages: Messages, tokenizer: Any, template: str, add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it a template with `{% generation %}` says that the assistant wrote."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            [[dict(message) for message in messages]],
            chat_template=template,
            return_assistant_tokens_mask=bool(GENERATION.search(template)),
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program of its own
        raise BadRowError(f"the chat template refuses the conversation ({shortened(one_line(error), 200)})") from None
    return str(texts[0]), [(begin, end) for begin, end in (spans[0] if spans else []) if end > begin]


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    """The text in pieces: those of `spans` and those between them."""
    pieces: list[Piece] = []
    position = 0
    for begin, end in spans:
        pieces += [(text[position:begin], False), (text[begin:end], True)]
        position = end
    pieces.append((text[position:], False))
    return [piece for piece in pieces if piece[0]]
