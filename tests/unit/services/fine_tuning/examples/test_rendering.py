"""Conversations are rendered as transformers does, for training and for generation."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tokenizers import CHATML, MARKED, TEXT, byte_level, sentencepiece_like
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gradstream.core.errors import ConfigError, DataError
from gradstream.core.pretrained.tokenizer import END_IDS
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig
from gradstream.services.fine_tuning.examples.chat import chat_prompt_ids, render_conversation
from gradstream.services.fine_tuning.examples.conversations import conversation
from gradstream.services.fine_tuning.examples.dataset import prepare_examples, preview
from gradstream.services.fine_tuning.examples.encoding import Encoder
from gradstream.services.fine_tuning.examples.preparation import check_data
from gradstream.services.fine_tuning.examples.reading import BadRowError

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
NO_BOS = PLAIN.removeprefix("{{ bos_token }}")
TURNS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LETTERS = sorted(set("".join(TEXT)) | set("▁é東🎉<>[]/|!?0\n_") | set("abcdefghijklmnopqrstuvwxyzINST"))
SPECIAL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")


def bpe(pre_tokenizer: Any, decoder: Any, normalizer: Any = None, alphabet: Any = LETTERS) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def wrapped(tokenizer: Tokenizer, template: str, single: str = "", **kinds: str) -> Any:
    """As transformers has it, with bos and eos; `single`: what a post-processor makes of a text."""
    if single:
        known = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>") if name in single]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kinds
    )
    made.chat_template = template
    return made


def byte_bpe() -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), alphabet=alphabet)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    return bpe(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False), decoders.Metaspace(prepend_scheme=scheme))


def prepending() -> Tokenizer:
    """As Llama 2's: a blank before every piece between special tokens."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return bpe(None, decoders.Sequence(parts), normalizer)


MAKERS: dict[str, Any] = {
    "byte-level, ChatML": lambda: byte_level(CHATML),
    "byte-level, ChatML, turn ends texts": lambda: byte_level(CHATML, "<|im_end|>"),
    "byte-level, marked": lambda: byte_level(MARKED),
    "byte-level, marked without its end": lambda: byte_level(UNMARKED_END),
    "byte-level, bos by post-processor and template": lambda: wrapped(byte_bpe(), PLAIN, "<s> $A"),
    "byte-level, bos by post-processor alone": lambda: wrapped(byte_bpe(), NO_BOS, "<s> $A </s>"),
    "byte-level, trimmed offsets": lambda: wrapped(byte_bpe(), TURNS),
    "sentencepiece": lambda: sentencepiece_like(PLAIN),
    "sentencepiece, no bos": lambda: sentencepiece_like(NO_BOS),
    "metaspace always": lambda: wrapped(metaspace("always"), PLAIN, "<s> $A"),
    "metaspace first": lambda: wrapped(metaspace("first"), TURNS, "<s> $A </s>"),
    "metaspace never": lambda: wrapped(metaspace("never"), NO_BOS),
    "prepended blank": lambda: wrapped(prepending(), TURNS, "<s> $A"),
}


@functools.cache
def made(name: str) -> Any:
    return MAKERS[name]()


@functools.cache
def encoder_of(name: str) -> Encoder:
    return Encoder(made(name))


WORDS = st.sampled_from(
    ["the", "Paris", "é東", "def f():\n    x", "  ", "\n", " a", "hello?", "🎉", "[INST]", "<", "0"]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=5).map(" ".join).filter(str.strip)
WRITTEN = st.lists(st.one_of(WORDS, st.sampled_from(SPECIAL)), min_size=1, max_size=5).map("".join).filter(str.strip)


def conversations(texts: Any) -> Any:
    """Turns of user and assistant, some of them unanswered."""
    turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)

    def messages(pairs: list[tuple[str, str]], more: str | None) -> list[dict[str, str]]:
        found = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return found if more is None else [*found, {"role": "user", "content": more}]

    return st.builds(messages, turns, st.none() | texts)


cheap = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", MAKERS)
@cheap
@given(messages=conversations(TEXTS))
def test_the_ids_are_those_of_apply_chat_template(name: str, messages: list[dict[str, str]]) -> None:
    tokenizer = made(name)
    encoder = encoder_of(name)
    found = render_conversation(conversation(messages), tokenizer, encoder)
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert found.ids == theirs["input_ids"]
    assert not found.is_end_appended
    if "{% generation" in tokenizer.chat_template:
        pairs = list(zip(found.is_target, theirs["assistant_masks"], strict=True))
        assert all(mine for mine, mask in pairs if mask)
        extra = [found.ids[number] for number, (mine, mask) in enumerate(pairs) if mine and not mask]
        ends = [token for token in extra if token in encoder.end_ids]
        assert bool(ends) == (tokenizer.chat_template == UNMARKED_END)
        # transformers takes the first token alone of a last character that has several.
        last = {message["content"][-1] for message in messages if message["role"] == "assistant"}
        assert len(extra) == len(ends) or not "".join(last).isascii()
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    ends = [n for n, is_target in enumerate(found.is_target) if is_target and found.ids[n] in encoder.end_ids]
    assert len(ends) == len(replies)
    begin = 0
    for end, reply in zip(ends, replies, strict=True):
        numbers = [n for n in range(begin, end) if found.is_target[n]]
        assert numbers == list(range(end - len(numbers), end))
        said = encoder.decode([found.ids[n] for n in numbers])
        # A token may hold the line break before a reply and the first one in it.
        assert said.strip() == encoder.decode(encoder.ids(reply)).strip()
        begin = end + 1


@pytest.mark.parametrize("name", MAKERS)
@cheap
@given(messages=conversations(TEXTS))
def test_a_prompt_of_the_service_is_that_of_apply_chat_template(name: str, messages: list[dict[str, str]]) -> None:
    tokenizer = made(name)
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert chat_prompt_ids(messages, tokenizer, encoder_of(name)) == theirs


@pytest.mark.parametrize("name", MAKERS)
@cheap
@given(messages=conversations(WRITTEN))
def test_a_text_is_never_markup(name: str, messages: list[dict[str, str]]) -> None:
    tokenizer = made(name)
    encoder = encoder_of(name)
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, sanitize_control_tokens=True)
    try:
        found = render_conversation(conversation(messages), tokenizer, encoder)
    except BadRowError as error:
        assert "can encode it only as the special token" in str(error)  # noqa: PT017
        return
    assert found.ids == theirs
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, sanitize_control_tokens=True
    )
    assert chat_prompt_ids(messages, tokenizer, encoder) == prompt
    harmless = [{**message, "content": "x"} for message in messages]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    count = sum(token in special for token in tokenizer.apply_chat_template(harmless, return_dict=False))
    assert sum(token in special for token in found.ids if token != tokenizer.unk_token_id) <= count


@pytest.mark.parametrize("name", [name for name in MAKERS if "byte" in name])
def test_a_row_that_is_rendered_already_has_one_beginning_and_one_end(tmp_path: Path, name: str) -> None:
    tokenizer = made(name)
    encoder = Encoder(tokenizer)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    by_default = "<s>" if tokenizer("x").input_ids[0] == tokenizer.bos_token_id else ""
    for row in ({"prompt": f"{bos}[INST] hi", "completion": f" yes{eos}"}, {"text": f"{bos}[INST] hi yes{eos}"}):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(row))
        (example,) = preview(ExamplesConfig(path=str(path)), tokenizer, 64, 1).examples
        assert "".join(piece.text for piece in example.pieces) == f"{bos}[INST] hi yes{eos}"
    path.write_text(json.dumps({"prompt": "[INST] hi", "completion": " yes"}))
    (example,) = preview(ExamplesConfig(path=str(path)), tokenizer, 64, 1).examples
    assert "".join(piece.text for piece in example.pieces) == f"{by_default}[INST] hi yes{eos}"
    assert encoder.text_ids(f"{bos}hi") == encoder.ids(f"{bos}hi") or not bos


def test_what_a_post_processor_puts_first_need_not_be_named_bos(tmp_path: Path) -> None:
    tokenizer = wrapped(byte_bpe(), PLAIN, "<s> $A")
    tokenizer.bos_token = None
    encoder = Encoder(tokenizer)
    assert encoder.begin_ids == (tokenizer.convert_tokens_to_ids("<s>"),)
    assert encoder.text_ids("hi") == tokenizer("hi").input_ids


def test_a_completion_after_a_special_token_is_encoded_as_after_it(tmp_path: Path) -> None:
    """Where every piece between special tokens gets a blank of its own, this one does too."""
    tokenizer = made("prepended blank")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "<|im_start|>", "completion": "hello"}))
    (example,) = preview(ExamplesConfig(path=str(path)), tokenizer, 64, 1).examples
    ids = tokenizer("<|im_start|>hello").input_ids
    assert example.num_tokens == len(ids) + 1
    encoder = Encoder(tokenizer)
    assert encoder.text_ids("<|im_start|>") + encoder.ids_after("hello", "<|im_start|>") == ids


# Nothing in a row is dropped in silence

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
RICH = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>"
    "{% endif %}{{ m['content'] }}{% if m['tool_calls'] %}<tool_call>{{ m['tool_calls'] | tojson }}</tool_call>"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}[{{ part['text'] }}]{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last ="
    " loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if "
    "m['role'] == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m['reasoning_content'] }}\n</think>\n\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""As Qwen 3's: what was thought in earlier turns is left out, and the prompt for a reply begins to think."""


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def reply(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def look(tmp_path: Path, rows: list[Any], tokenizer: Any, **settings: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return preview(ExamplesConfig(path=str(path), **settings), tokenizer, 400, 10)


def shown(example: Any) -> str:
    return "".join(f"⟦{piece.text}⟧" if piece.is_target else piece.text for piece in example.pieces)


def reason(tmp_path: Path, row: Any, tokenizer: Any) -> str:
    report = look(tmp_path, [row], tokenizer).report
    assert report.num_bad == 1, report
    return str(report.bad_rows[0]).removeprefix(f"{tmp_path}/rows.jsonl:1: ")


TOOL_ROWS = [
    {"messages": [user("weather?"), reply("ok")], "tools": TOOLS},
    {"messages": [user("weather?"), reply("let me look", tool_calls=[CALL])]},
    {"messages": [user("w"), reply("", tool_calls=[CALL]), {"role": "tool", "content": "5"}, reply("5")]},
    {"messages": [user("1+1?"), reply("2", reasoning_content="one and one")]},
]


@pytest.mark.parametrize("row", TOOL_ROWS, ids=["tools", "calls", "calls alone", "reasoning"])
def test_tools_calls_and_reasoning_are_rendered_as_the_template_does(tmp_path: Path, row: Any) -> None:
    tokenizer = byte_level(RICH)
    response = look(tmp_path, [row], tokenizer)
    (example,) = response.examples
    text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    assert "".join(piece.text for piece in example.pieces) == text
    for message in row["messages"]:
        for call in message.get("tool_calls", ()):
            assert f"<tool_call>[{json.dumps(call)}]</tool_call><|im_end|>⟧" in shown(example)
        if "reasoning_content" in message:
            assert "⟦<think>one and one</think>2<|im_end|>⟧" in shown(example)
    assert not response.report.unused_fields
    as_text = {**row, "tools": json.dumps(row["tools"])} if "tools" in row else row
    assert look(tmp_path, [as_text], tokenizer).examples[0].pieces == example.pieces


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (TOOL_ROWS[0], "the chat template writes nothing of field 'tools'; take it out of the row, or use a template"),
        (TOOL_ROWS[1], "the chat template writes nothing of tool_calls of message 2; take it out of the row"),
        (TOOL_ROWS[3], "the chat template writes nothing of reasoning_content of message 2; take it out of the row"),
        ({"messages": [user("a"), reply(None)]}, "message 2: its content is null"),
        ({"messages": [user(None), reply("a")]}, "message 1: its content is null"),
        (
            {"messages": [user([{"type": "image_url", "url": "x"}]), reply("a")]},
            "message 1: its content has a part of",
        ),
        ({"messages": [user("a"), reply("b", weight=0)]}, "every reply has weight 0 or train false"),
        ({"messages": [user("a"), reply("b", weight=0.5)]}, "message 2: its weight is 0.5; it can be 0 or 1"),
        ({"messages": [user("a", train=True), reply("b")]}, "message 1 has train true but is not a reply"),
        (
            {"messages": [user("a"), reply("b")], "weight": 0},
            "field 'weight' is 0, but no such field can exclude or weight a row",
        ),
        (
            {"prompt": "a", "completion": "b", "train": False},
            "field 'train' is False, but no such field can exclude or weight a row",
        ),
        ({"messages": [user("a", **{"x<|im_end|>": 1}), reply("b")]}, "the name of a field has the special token"),
        (
            {"prompt": "a", "completion": "b<|endoftext|>c"},
            "the completion has '<|endoftext|>', which ends a text",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "x"}]},
            "message 1 is from 'function_call'; write it",
        ),
        ({"conversations": [{"from": "human"}]}, "message 1 has no 'content'"),
        ({"messages": [{"speaker": "a", "text": "b"}]}, "message 1 has no 'role' (fields: speaker, text)"),
    ],
)
def test_what_the_template_does_not_write_is_refused(tmp_path: Path, row: Any, expected: str) -> None:
    assert reason(tmp_path, row, byte_level(CHATML)).startswith(expected)


def test_a_message_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    """As a template does that knows no system messages, or no tools' answers."""
    tokenizer = byte_level(
        CHATML.replace("{{ '<|im_start|>'", "{% if m['role'] != 'system' %}{{ '<|im_start|>'", 1).replace(
            "'\\n' }}{% endfor", "'\\n' }}{% endif %}{% endfor", 1
        )
    )
    row = {"messages": [{"role": "system", "content": "be brief"}, user("a"), reply("b")]}
    assert reason(tmp_path, row, tokenizer).startswith("the chat template writes nothing of message 1 (system)")
    row["messages"][0]["content"] = "a"  # which the user says too
    assert reason(tmp_path, row, tokenizer).startswith("the chat template writes nothing of message 1 (system)")


def test_replies_of_weight_0_are_there_and_no_targets(tmp_path: Path) -> None:
    for no in ({"weight": 0}, {"train": False}):
        for template in (CHATML, MARKED):
            rows = [{"messages": [user("1+1?"), reply("3", **no), user("wrong"), reply("2", weight=1)]}]
            (example,) = look(tmp_path, rows, byte_level(template)).examples
            assert [piece.text for piece in example.pieces if piece.is_target] == ["2<|im_end|>"]
            assert "3<|im_end|>" in "".join(piece.text for piece in example.pieces)
    rows = [{"messages": [user("1+1?"), reply("2"), user("sure?"), reply("no", weight=0)]}]
    (example,) = look(tmp_path, rows, byte_level(CHATML)).examples
    assert [piece.text for piece in example.pieces if piece.is_target] == ["2<|im_end|>"]


def test_contents_that_are_lists(tmp_path: Path) -> None:
    """As the template writes them; where it would write the list itself, its texts."""
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    rows = [{"messages": [user(parts), reply("yo")]}]
    assert "user\nhello<|im_end|>" in shown(look(tmp_path, rows, byte_level(CHATML)).examples[0])
    assert "user\n[hel][lo]<|im_end|>" in shown(look(tmp_path, rows, byte_level(PARTS)).examples[0])


def test_fields_that_are_not_used_are_named_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "system": "be terse", "id": n, "source": None if n else "x"}
        for n in range(3)
    ]
    assert dict(look(tmp_path, rows, byte_level()).report.unused_fields) == {"system": 3, "id": 3, "source": 1}
    rows = [{"messages": [user("a", name="Al"), reply("b", refusal=None)], "prompt": "x", "meta": {"n": 1}}]
    unused = dict(look(tmp_path, rows, byte_level(CHATML)).report.unused_fields)
    assert unused == {"messages[].name": 1, "prompt": 1, "meta": 1}
    path = tmp_path / "a.parquet"
    columns = {"prompt": ["a", "b"], "completion": ["c", "d"], "score": [1.0, None], "tags": [["x"], None]}
    parquet.write_table(arrow.table(columns), path)
    report = preview(ExamplesConfig(path=str(path)), byte_level(), 64, 1).report
    assert dict(report.unused_fields) == {"score": 1, "tags": 2}


def test_rows_of_sharegpt_and_alpaca(tmp_path: Path) -> None:
    chat = byte_level(CHATML)
    messages = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    plain = look(tmp_path, [{"messages": [user("hi"), reply("yo")]}], chat).examples[0].pieces
    response = look(tmp_path, [{"conversations": messages}], chat)
    assert response.report.format == "chat"
    assert "ShareGPT" in response.report.notes[0]
    assert response.examples[0].pieces == plain
    assert (
        look(tmp_path, [{"conversations": messages}], chat, messages_field="conversations").examples[0].pieces == plain
    )
    system = look(tmp_path, [{"conversations": messages, "system": "be brief"}], chat).examples[0]
    assert shown(system).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user")
    alpaca = {"instruction": "Translate", "input": "dog", "output": "chien", "text": "all of it"}
    response = look(tmp_path, [alpaca], chat)
    assert (response.report.format, dict(response.report.unused_fields)) == ("chat", {"text": 1})
    assert "user\nTranslate\ndog<|im_end|>" in shown(response.examples[0])
    response = look(tmp_path, [alpaca, {**alpaca, "input": ""}], byte_level())
    assert response.report.format == "prompt-completion"
    both = [shown(example) for example in response.examples]
    assert both[0].endswith("### Instruction:\nTranslate\n\n### Input:\ndog\n\n### Response:\n⟦chien<|endoftext|>⟧")
    assert both[1].endswith("request.\n\n### Instruction:\nTranslate\n\n### Response:\n⟦chien<|endoftext|>⟧")


def test_a_prompt_and_a_completion_may_be_messages(tmp_path: Path) -> None:
    """As TRL has them: of the completion alone the replies are trained on."""
    chat = byte_level(CHATML)
    row = {"prompt": [user("a"), reply("b"), user("c")], "completion": [reply("d"), user("e"), reply("f")], "id": 1}
    for more in ({}, {"format": "prompt-completion"}, {"format": "chat"}):
        response = look(tmp_path, [row], chat, **more)
        assert (response.report.format, dict(response.report.unused_fields)) == ("chat", {"id": 1})
        whole = chat.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        trained = whole.replace("d<|im_end|>", "⟦d<|im_end|>⟧").replace("f<|im_end|>", "⟦f<|im_end|>⟧")
        assert shown(response.examples[0]) == trained
    named = {"question": row["prompt"], "answer": row["completion"], "tools": None}
    response = look(tmp_path, [named], chat, prompt_field="question", completion_field="answer")
    assert (shown(response.examples[0]), dict(response.report.unused_fields)) == (trained, {})
    both = {"messages": [user("a"), reply("b")], "prompt": "a"}
    assert dict(look(tmp_path, [both], chat).report.unused_fields) == {"prompt": 1}
    good = {"prompt": [user("a")], "completion": [reply("b")]}
    for bad, message in (
        ({"prompt": [], "completion": [reply("b")]}, "the prompt has no message"),
        ({"prompt": [user("a"), reply("b")], "completion": [user("c")]}, "the completion has no assistant message"),
        ({"prompt": [user("a")], "completion": "b"}, "the completion is text, not a list of messages"),
        ({"prompt": [user("a")], "completion": None}, "the completion is null, not a list of messages"),
    ):
        report = look(tmp_path, [good, bad], chat).report
        assert report.num_bad == 1
        assert f":2: {message}" in report.bad_rows[0]
    with pytest.raises(ConfigError, match="the base's tokenizer has no chat template"):
        look(tmp_path, [row], byte_level())


def test_a_null_is_no_field(tmp_path: Path) -> None:
    """Files of several shapes have the fields of all of them in every row."""
    chat = byte_level(CHATML)
    turns = {"messages": [user("a"), reply("b")]}
    shares = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    nothing = dict.fromkeys(("prompt", "completion", "messages", "conversations", "instruction", "output", "text"))
    plain = look(tmp_path, [turns], chat).examples[0].pieces
    for rows in ([turns, shares], [shares, turns]):
        response = look(tmp_path, [nothing | row for row in rows], chat)
        assert [example.pieces for example in response.examples] == [plain, plain]
        assert not response.report.unused_fields
    report = look(tmp_path, [nothing | {"text": "hi"}, nothing], chat).report
    assert (report.format, list(report.bad_rows)) == (
        "text",
        [f"{tmp_path}/rows.jsonl:2: field 'text' holds null, not text"],
    )
    assert dict(look(tmp_path, [turns | shares], chat).report.unused_fields) == {"conversations": 1}


def test_messages_may_be_json_in_a_text(tmp_path: Path) -> None:
    chat = byte_level(CHATML)
    messages = [user("a"), reply("b")]
    response = look(tmp_path, [{"messages": json.dumps(messages)}, {"messages": messages}], chat)
    assert response.examples[0].pieces == response.examples[1].pieces
    assert reason(tmp_path, {"messages": "hello"}, chat).startswith(
        "the messages are text, not a list or the JSON of one ("
    )
    twice = '[{"role": "user", "role": "assistant", "content": "a"}]'
    assert "the key 'role' comes twice" in reason(tmp_path, {"messages": twice}, chat)


def test_a_first_row_that_is_no_example_is_a_bad_row(tmp_path: Path) -> None:
    report = look(tmp_path, [{"version": 1}, {"prompt": "a", "completion": "b"}], byte_level()).report
    assert (report.format, report.num_bad, report.num_train) == ("prompt-completion", 1, 1)
    assert "(fields: version)" in report.bad_rows[0]
    many = {f"key{n}": n for n in range(20)}
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: no fields .*\(fields: key0, .*, key19\); name those"):
        look(tmp_path, [many, many], byte_level())


def test_a_template_that_leaves_earlier_thoughts_out(tmp_path: Path) -> None:
    """Its replies of earlier turns are found all the same: each has the token after it that ends a turn."""
    tokenizer = byte_level(THINKING)
    messages = [user("1+1?"), reply("2", reasoning_content="add"), user("2+2?"), reply("<b>", reasoning_content="more")]
    (example,) = look(tmp_path, [{"messages": messages}], tokenizer).examples
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(piece.text for piece in example.pieces) == text
    targets = [piece.text for piece in example.pieces if piece.is_target]
    assert targets == ["2<|im_end|>", "more\n</think>\n\n<b><|im_end|>"]


def test_end_of_text_is_appended_where_the_template_has_no_end(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    response = look(tmp_path, [{"messages": [user("hi"), reply("yo")]}], byte_level(template))
    assert shown(response.examples[0]) == "user: hi\n⟦assistant: yo\n<|endoftext|>⟧"
    assert response.report.notes == [
        "1 conversations end with no end of text by the chat template; '<|endoftext|>' is added"
    ]


def test_a_reply_ends_where_the_next_message_begins_if_that_token_ends_texts(tmp_path: Path) -> None:
    """As GLM's, whose ends of text are the tokens that begin the other roles' messages."""
    tokenizer = byte_level(
        "{% for m in messages %}{{ '<|im_start|>' if m['role'] == 'user' else '<|im_end|>' }}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|im_end|>{% endif %}"
    )
    setattr(tokenizer, END_IDS, (tokenizer.convert_tokens_to_ids("<|im_start|>"),))
    messages = [user("hi"), reply("yo"), user("so"), reply("bye")]
    both = "<|im_start|>hi<|im_end|>⟦yo<|im_start|>⟧so<|im_end|>⟦bye<|endoftext|>⟧"
    assert shown(look(tmp_path, [{"messages": messages}], tokenizer).examples[0]) == both
    first = [user("hi"), reply("yo"), user("so"), reply("bye", weight=0)]
    assert shown(look(tmp_path, [{"messages": first}], tokenizer).examples[0]) == (
        "<|im_start|>hi<|im_end|>⟦yo<|im_start|>⟧so<|im_end|>bye"
    )


def test_all_ends_that_a_template_writes_at_once_are_targets(tmp_path: Path) -> None:
    tokenizer = byte_level(CHATML.replace("'<|im_end|>'", "'<|im_end|><|endoftext|>'"))
    example = look(tmp_path, [{"messages": [user("hi"), reply("yo")]}], tokenizer).examples[0]
    assert shown(example).endswith("assistant\n⟦yo<|im_end|><|endoftext|>⟧\n")


@pytest.mark.parametrize("named", ["", "*.jsonl"], ids=["a directory", "a glob"])
def test_examples_of_a_directory_and_of_a_glob(tmp_path: Path, named: str) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"prompt": f"{number}", "completion": "b"}) + "\n")
    config = ExamplesConfig(path=str(tmp_path / named))
    check_data(config)
    report = preview(config, byte_level(), 64, 1).report
    assert (report.num_rows, len(report.sha256)) == (3, 3)
    with pytest.raises(ConfigError, match="matches no file"):
        check_data(ExamplesConfig(path=str(tmp_path / "*.csv")))
    with pytest.raises(DataError, match="there is no file"):
        check_data(ExamplesConfig(path=str(tmp_path / "absent.jsonl")))


@pytest.mark.parametrize(
    ("count", "slots", "message"),
    [
        (100, 2, "all 100 examples are alike: a slot needs one to train on, and a different one has to be held out"),
        (1, 1, "there is one example: a slot needs one to train on, and a different one has to be held out; add rows"),
    ],
)
def test_rows_that_cannot_be_split(tmp_path: Path, count: int, slots: int, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"prompt": "p", "completion": "c"}) + "\n") * count)
    with pytest.raises(DataError, match=message):
        prepare_examples(ExamplesConfig(path=str(path)), byte_level(), 64, slots, str(tmp_path / "out"), 0)
    note = f"{count - 1} examples are the same as another one"
    assert (note in preview(ExamplesConfig(path=str(path)), byte_level(), 64, 1).report.notes) == (count > 1)
