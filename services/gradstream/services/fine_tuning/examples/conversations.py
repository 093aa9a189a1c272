"""Reads a conversation from a field of a row, and checks it message by message.

Messages have `role` and `content`, as in OpenAI and transformers, or `from` and `value`, as in ShareGPT. All other
fields of a message go to the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradstream.core.data.rows import each_key_once
from gradstream.core.errors import one_line
from gradstream.services.fine_tuning.examples.reading import BadRowError, checked_text, listed, shortened, type_name

ROLES = ("system", "user", "assistant", "developer", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names of the field for reasoning. transformers gives the template its value under all three names."""
REPLY_FIELDS = ("content", "tool_calls", *REASONING_FIELDS)
TRAIN_FIELDS = ("weight", "train")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the form that a chat template takes: dicts with `role`, usually `content`, and no null values.

    `is_trained` tells for each message whether its tokens are targets.
    """

    messages: list[dict[str, Any]]
    is_trained: tuple[bool, ...] = ()
    tools: list[dict[str, Any]] | None = None

    @property
    def last_trained(self) -> int:
        """The number of the last message that is trained on."""
        return max(number for number, trained in enumerate(self.is_trained) if trained)

    def before(self, number: int) -> Conversation:
        """The part of the conversation before a message."""
        return Conversation(self.messages[:number], self.is_trained[:number], self.tools)


def conversation(value: object, tools: object = None, system: object = None) -> Conversation:
    """Read the conversation of a row.

    `value` and `tools` are lists of objects, or their JSON; `system` is the text of a first message. Raises BadRowError
    that names the message and the reason why it cannot be used.
    """
    value = _parsed(value, "the messages are text, not a list or the JSON of one")
    if not isinstance(value, list):
        raise BadRowError(f"the messages are {type_name(value)}, not a list")
    messages: list[dict[str, Any]] = []
    is_trained: list[bool] = []
    for number, message in enumerate(value, 1):
        found, trained = _message(message, number)
        messages.append(found)
        is_trained.append(trained)
    if system is not None and system != "":
        if not isinstance(system, str):
            raise BadRowError(f"field 'system' holds {type_name(system)}, not text")
        if messages and messages[0]["role"] == "system":
            raise BadRowError("field 'system' and the first message are both the system's; take one of them out")
        messages.insert(0, {"role": "system", "content": checked_text(system, "field 'system'")})
        is_trained.insert(0, False)
    if not any(message["role"] == "assistant" for message in messages):
        roles = listed(sorted({message["role"] for message in messages}))
        there = f" (roles: {roles})" if messages else ""
        raise BadRowError(f"no assistant message, so there is nothing to learn{there}")
    if not any(is_trained):
        raise BadRowError("every reply has weight 0 or train false, so there is nothing to learn")
    return Conversation(messages, tuple(is_trained), _tools(tools))


def completed_conversation(prompt: object, completion: object, tools: object = None) -> Conversation:
    """Read the conversation of a row whose prompt and completion are lists of messages, as in TRL.

    The replies in the completion are trained on. Raises BadRowError as `conversation` does.
    """
    for value, what in ((prompt, "prompt"), (completion, "completion")):
        if not isinstance(value, list):
            raise BadRowError(f"the {what} is {type_name(value)}, not a list of messages as in the rest of the row")
    assert isinstance(prompt, list)
    assert isinstance(completion, list)
    if not prompt:
        raise BadRowError("the prompt has no message, so nothing comes before the completion")
    told = conversation([*prompt, *completion], tools)
    is_trained = tuple(trained and number >= len(prompt) for number, trained in enumerate(told.is_trained))
    if not any(is_trained):
        raise BadRowError("the completion has no assistant message that is trained on, so there is nothing to learn")
    return replace(told, is_trained=is_trained)


def strings(value: object) -> Iterator[tuple[str, bool]]:
    """Yield all texts in a JSON value, each with whether it is the key of an object."""
    if isinstance(value, str):
        yield value, False
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield str(key), True
            yield from strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from strings(entry)


def _parsed(value: object, refusal: str) -> object:
    """Parse `value` as JSON if it is text; return any other value unchanged. Raises BadRowError."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value, object_pairs_hook=each_key_once)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{refusal} ({one_line(error)[:80]})") from None


def _message(message: object, number: int) -> tuple[dict[str, Any], bool]:
    """Check a message; return it in the form that a template takes, and whether it is trained on."""
    if not isinstance(message, dict):
        raise BadRowError(f"message {number} is {type_name(message)}, not an object with role and content")
    found = {str(key): entry for key, entry in message.items() if entry is not None}
    if "from" in found and "role" not in found:
        found = _from_sharegpt(found, number)
    if "role" not in found:
        raise BadRowError(f"message {number} has no 'role' (fields: {listed(list(message))})")
    if not isinstance(found["role"], str):
        raise BadRowError(f"message {number}: its role is {type_name(found['role'])}, not text")
    try:
        checked_text(json.dumps(found, ensure_ascii=False, default=str), f"message {number}")
    except (ValueError, RecursionError):
        raise BadRowError(f"message {number} is nested too deeply") from None
    is_reply = found["role"] == "assistant"
    if "content" in found:
        found["content"] = _content(found["content"], number)
    for field in ("tool_calls", *REASONING_FIELDS):
        if field in found and not found[field]:
            del found[field]
    said = any(field in found for field in REPLY_FIELDS[1:])
    if "content" not in found and not (is_reply and said):
        null = "content" in message or "value" in message
        raise BadRowError(f"message {number}: its content is null" if null else f"message {number} has no 'content'")
    if is_reply and not said and not _texts(found["content"]).strip():
        raise BadRowError(f"message {number}, a reply, is empty")
    return found, _is_trained(found, number, is_reply)


def _from_sharegpt(message: dict[str, Any], number: int) -> dict[str, Any]:
    role = message.pop("from")
    if "value" in message:
        message["content"] = message.pop("value")
    if role == "function_call":
        raise BadRowError(f"message {number} is from 'function_call'; write it as an assistant's tool_calls")
    return {"role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, **message}


def _content(content: object, number: int) -> str | list[dict[str, str]]:
    """Check a message's content: text, or a list of parts that are all text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRowError(f"message {number}: its content is {type_name(content)}, not text")
    parts = []
    for part in content:
        if not isinstance(part, dict):
            raise BadRowError(f"message {number}: its content is a list, not text, and has {type_name(part)} in it")
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = shortened(str(part.get("type")))
            raise BadRowError(f"message {number}: its content has a part of type '{kind}'; only text is trained on")
        parts.append({key: entry for key, entry in part.items() if entry is not None})
    return parts


def _texts(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def joined(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its content as one text."""
    return {**message, "content": _texts(message["content"])} if "content" in message else dict(message)


def _is_trained(message: dict[str, Any], number: int, is_reply: bool) -> bool:
    """Return whether a message is trained on, and remove the fields that tell it."""
    trained = is_reply
    for field in TRAIN_FIELDS:
        value = message.pop(field, None)
        if value is None:
            continue
        if value not in (0, 1):
            raise BadRowError(f"message {number}: its {field} is {shortened(repr(value))}; it can be 0 or 1")
        if field == "train" and value and not is_reply:
            raise BadRowError(f"message {number} has train true but is not a reply; only replies are trained on")
        trained = trained and bool(value)
    return trained


def _tools(tools: object) -> list[dict[str, Any]] | None:
    tools = _parsed(tools, "field 'tools' holds text that is no JSON")
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError(f"field 'tools' holds {type_name(tools)}, not a list of objects")
    try:
        checked_text(json.dumps(tools, ensure_ascii=False, default=str), "field 'tools'")
    except (ValueError, RecursionError):
        raise BadRowError("field 'tools' is nested too deeply") from None
    return [dict(tool) for tool in tools]
