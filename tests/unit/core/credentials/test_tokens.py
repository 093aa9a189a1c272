"""Tokens: every refusal gives its reason in one line, and invalid tables from files or peers are refused."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import random
import ssl
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstream.core.credentials.tokens import (
    KEPT_AFTER_END_SECONDS,
    MAX_TABLE_BYTES,
    MAX_TOKENS,
    Token,
    TokenTable,
    check,
    digest,
    expiring,
    is_name,
    new_token,
    succeeds,
    token_ids,
    utc,
)
from gradstream.core.errors import ConfigError, one_line
from gradstream.core.storage.strict_json import parse_object

CLUSTER = "0a1b2c3d"
NOW = 1_800_000_000
DAY = 86_400


def issued(role: str = "worker", name: str = "w", **changes: Any) -> tuple[str, Token]:
    """A token's text and its entry, which is good at NOW."""
    text, token_id = new_token(CLUSTER)
    token = Token(token_id, digest(text), "c" * 64, role, name, NOW - DAY, NOW + DAY)
    return text, dataclasses.replace(token, **changes)


def table_of(*tokens: Token) -> TokenTable:
    """A table that went through its file."""
    return TokenTable.parse(TokenTable(CLUSTER, tokens).serialize())


def test_a_token_is_of_the_form_that_is_documented() -> None:
    text, token_id = new_token(CLUSTER)
    assert token_ids(text) == (CLUSTER, token_id)
    prefix, cluster, found_id, secret = text.split("_", 3)
    assert (prefix, cluster, found_id, len(secret)) == ("gst", CLUSTER, token_id, 43)
    assert new_token(CLUSTER)[0] != text


def test_a_good_token() -> None:
    text, token = issued()
    assert check(text, table_of(issued()[1], token), NOW) == (token, f"token {token.id} of worker 'w'")


def refusals() -> dict[str, tuple[str, TokenTable, list[str]]]:
    """For each way in which a token can be bad: its text, the table, and what the reason must name."""
    text, token = issued()
    other, _ = issued()
    foreign, _ = new_token("ffffffff")
    wrong = text[:-3] + ("abc" if text[-3:] != "abc" else "cba")
    revoked, expired = NOW - 3600, NOW - 7200
    both = dataclasses.replace(token, expires_at=expired, revoked_at=expired - 60)
    person = issued("admin", "anna", expires_at=expired)
    return {
        "none": ("", table_of(token), ["no token", "gradstream login", "GRADSTREAM_CREDENTIALS"]),
        "cut off": (text[:-1], table_of(token), ["malformed or cut off", "certs issue"]),
        "with a newline": (text + "\n", table_of(token), ["malformed or cut off"]),
        "of another kind": ("Basic dXNlcjpwYXNz", table_of(token), ["malformed or cut off"]),
        "not ASCII": ("gst_" + "é" * 60, table_of(token), ["malformed or cut off"]),
        "of another cluster": (foreign, table_of(token), ["cluster ffffffff", f"cluster {CLUSTER}", "of this cluster"]),
        "unknown": (other, table_of(token), ["unknown", CLUSTER, "certs issue"]),
        "wrong secret": (wrong, table_of(token), [token.id, "altered"]),
        "expired": (
            text,
            table_of(dataclasses.replace(token, expires_at=expired)),
            [token.id, "worker 'w' expired", utc(expired), utc(NOW), "certs rotate"],
        ),
        "expired now": (text, table_of(dataclasses.replace(token, expires_at=NOW)), ["expired", utc(NOW)]),
        "expired, a person's": (person[0], table_of(person[1]), ["admin 'anna' expired", "issue admin --name anna"]),
        "revoked": (
            text,
            table_of(dataclasses.replace(token, revoked_at=revoked)),
            [token.id, "worker 'w' was revoked", utc(revoked), "certs issue"],
        ),
        "revoked, then expired": (text, table_of(both), ["was revoked"]),
        "the table is empty": (text, table_of(), ["unknown"]),
    }


@pytest.mark.parametrize("case", list(refusals()))
def test_a_refusal_is_one_line_with_cause_and_cure(case: str) -> None:
    text, table, names = refusals()[case]
    token, reason = check(text, table, NOW)
    assert token is None
    for name in names:
        assert name in reason
    assert reason == " ".join(reason.split())
    assert "; " in reason
    if len(text) > 40:
        assert text[-40:-1] not in reason


def test_secrets_are_not_shown() -> None:
    text, token = issued()
    assert token.sha256 not in repr(token)
    assert text[-43:] not in table_of(token).serialize().decode()


def test_a_table_survives_its_file() -> None:
    tokens = tuple(issued("submitter", f"anna.{i}@example.org", revoked_at=NOW if i % 2 else None)[1] for i in range(5))
    assert table_of(*tokens) == TokenTable(CLUSTER, tokens)
    assert table_of() == TokenTable(CLUSTER)


def test_a_full_table_can_be_read() -> None:
    tokens = tuple(
        Token(f"{i:08x}", "f" * 64, "f" * 64, "fine-tuning", "n" * 63, 10**11, 10**11, 10**11)
        for i in range(MAX_TOKENS)
    )
    data = TokenTable(CLUSTER, tokens).serialize()
    assert len(data) < MAX_TABLE_BYTES < 4 << 20
    assert TokenTable.parse(data).find("00001fff") == tokens[-1]
    with pytest.raises(ConfigError, match=r"the token table is full \(8193 tokens; at most 8192, .*issue fewer"):
        TokenTable(CLUSTER, tokens).updated([issued()[1]], NOW)


def with_certificate(length: int, **changes: Any) -> Token:
    der = os.urandom(length)
    named = {"certificate": base64.b64encode(der).decode(), "certificate_sha256": hashlib.sha256(der).hexdigest()}
    return issued(**named, **changes)[1]


def test_a_table_never_grows_beyond_a_message() -> None:
    """Services' certificates are in it; what ended gives its own up."""
    table = TokenTable(CLUSTER, tuple(with_certificate(600) for _ in range(4_000)))
    with pytest.raises(ConfigError, match=r"the token table is full \(4001 tokens; at most 8192, and 4032 KiB\)"):
        table.updated([issued()[1]], NOW)
    revoked = [dataclasses.replace(token, revoked_at=NOW - 1) for token in table.tokens[:2_000]]
    assert len(table.updated(revoked, NOW).serialize()) < MAX_TABLE_BYTES


def test_the_certificates_of_a_role_are_those_that_are_good() -> None:
    good, ended, other = (
        with_certificate(300),
        with_certificate(300, revoked_at=NOW - 1),
        with_certificate(300, role="server"),
    )
    table = table_of(good, ended, other)
    pem = table.certificates("worker", NOW)
    assert ssl.PEM_cert_to_DER_cert(pem.decode()) == base64.b64decode(good.certificate)
    assert table.certificates("worker", NOW + 2 * DAY) == b""


def test_a_certificate_that_is_not_the_named_one_is_damage() -> None:
    token = dataclasses.replace(with_certificate(300), certificate_sha256="0" * 64)
    with pytest.raises(ConfigError, match="its 'certificate' cannot be right"):
        table_of(token)


def test_a_table_of_before_certificates_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="whose tokens counted with any certificate; remove it and run"):
        TokenTable.parse(b'{"gradstream_tokens": 1, "cluster": "0a1b2c3d", "tokens": []}')


def test_updating_replaces_by_id_and_forgets_what_ended_long_ago() -> None:
    ended = NOW - KEPT_AFTER_END_SECONDS
    first, second, third, fourth = (issued(name=name)[1] for name in ("a", "b", "c", "d"))
    table = table_of(
        dataclasses.replace(first, expires_at=ended),
        dataclasses.replace(second, expires_at=ended + 1),
        dataclasses.replace(third, revoked_at=ended),
    )
    changed = dataclasses.replace(second, revoked_at=ended + 1)
    assert table.updated([changed, fourth], NOW).tokens == (changed, fourth)
    assert table_of(first, second).without(first.id).tokens == (second,)


def damaged_tables() -> dict[str, tuple[bytes, str]]:
    """Tables that are not, and what the error names."""
    _, token = issued()
    whole = json.loads(TokenTable(CLUSTER, (token,)).serialize())

    def with_table(**changes: Any) -> bytes:
        return json.dumps({**whole, **changes}).encode()

    def with_entry(**changes: Any) -> bytes:
        return with_table(tokens=[{**whole["tokens"][0], **changes}])

    lacking = {key: value for key, value in whole["tokens"][0].items() if key != "sha256"}
    return {
        "empty": (b"", "no JSON at line 1"),
        "cut off": (json.dumps(whole).encode()[:-5], "no JSON at line 1, column"),
        "not UTF-8": (b"\xff\xfe{}", "no JSON"),
        "a list": (b"[]", "not a JSON object"),
        "nested deeply": (b"[" * 100_000, "no JSON"),
        "a huge number": (b'{"a": ' + b"9" * 10_000 + b"}", "no JSON"),
        "NaN": (b'{"a": NaN}', "no JSON"),
        "a key twice": (b'{"cluster": "a", "cluster": "b"}', "no JSON"),
        "too large": (b" " * (MAX_TABLE_BYTES + 1), f"has more than {MAX_TABLE_BYTES} bytes"),
        "another form": (with_table(gradstream_tokens=3), "update gradstream"),
        "a bool for a form": (with_table(gradstream_tokens=True), "'gradstream_tokens' is a bool"),
        "no cluster": (b'{"gradstream_tokens": 2, "tokens": []}', "it has no 'cluster'"),
        "a strange cluster": (with_table(cluster="XY"), "not 8 hex digits"),
        "an unknown key": (with_table(more=1), "does not know"),
        "tokens are no list": (with_table(tokens={}), "'tokens' is a dict"),
        "too many tokens": (with_table(tokens=[1] * (MAX_TOKENS + 1)), "more than 8192 tokens"),
        "an entry is no object": (with_table(tokens=[1]), "entry 0 is damaged: not a JSON object"),
        "an entry twice": (with_table(tokens=[whole["tokens"][0]] * 2), "has a token twice"),
        "an entry lacks a key": (with_table(tokens=[lacking]), "entry 0 is damaged: it has no 'sha256'"),
        "an entry has one more": (with_entry(more=1), "does not know"),
        "an id": (with_entry(id="12345678\n"), "its 'id' cannot be right"),
        "a hash": (with_entry(sha256="f" * 63), "its 'sha256' cannot be right"),
        "a role": (with_entry(role="root"), "its 'role' cannot be right"),
        "a name": (with_entry(name="a b"), "its 'name' cannot be right"),
        "a name of surrogates": (with_entry(name="\ud800"), "its 'name' cannot be right"),
        "a long name": (with_entry(name="a" * 64), "its 'name' cannot be right"),
        "a time before all": (with_entry(issued_at=-1), "its 'issued_at' cannot be right"),
        "a time after all": (with_entry(expires_at=10**12), "its 'expires_at' cannot be right"),
        "a time that is a bool": (with_entry(revoked_at=True), "'revoked_at' is a bool"),
        "a time that is a float": (with_entry(expires_at=1.5), "'expires_at' is a float"),
    }


@pytest.mark.parametrize("case", list(damaged_tables()))
def test_a_damaged_table_is_refused_in_one_line(case: str) -> None:
    data, message = damaged_tables()[case]
    with pytest.raises(ConfigError) as caught:
        TokenTable.parse(data, "/state/tokens.json")
    text = str(caught.value)
    assert message in text
    assert text.startswith("/state/tokens.json")
    assert text == one_line(caught.value)
    assert len(text) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=4,
)
ENTRIES = st.fixed_dictionaries(
    {
        "id": st.from_regex(r"[0-9a-f]{8}", fullmatch=True) | JSON,
        "sha256": st.just("0" * 64) | JSON,
        "role": st.sampled_from(["worker", "admin"]) | JSON,
        "name": st.just("w") | JSON,
        "issued_at": st.integers() | JSON,
        "expires_at": st.integers() | JSON,
    },
    optional={"revoked_at": st.none() | st.integers() | JSON, "other": JSON},
)
TABLES = st.fixed_dictionaries(
    {
        "gradstream_tokens": st.just(1) | JSON,
        "cluster": st.just(CLUSTER) | JSON,
        "tokens": st.lists(ENTRIES | JSON, max_size=3),
    }
)


def parsed_or_refused(data: bytes) -> None:
    """What parses is what was serialized; all else is a ConfigError on one line."""
    table, message = TokenTable(CLUSTER), ""
    try:
        table = TokenTable.parse(data)
    except ConfigError as error:
        message = str(error)
    assert message == " ".join(message.split())
    assert TokenTable.parse(table.serialize()) == table
    for token in table.tokens:
        utc(token.expires_at)
        check(f"gst_{table.cluster}_{token.id}_{'a' * 43}", table, NOW)


@settings(deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    parsed_or_refused(data)


@settings(deadline=None)
@given(TABLES)
def test_no_table_like_document_breaks_the_parser(document: dict[str, Any]) -> None:
    parsed_or_refused(json.dumps(document).encode())


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_no_altered_table_breaks_the_parser(seed: int) -> None:
    chance = random.Random(seed)
    tokens = tuple(Token(f"{i:08x}", "0" * 64, "0" * 64, "viewer", "v", NOW, NOW + i) for i in range(3))
    data = bytearray(TokenTable(CLUSTER, tokens).serialize())
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data))
        if chance.random() < 0.5:
            data[place] = chance.choice(b'"{}[],:0e-\\\x00\xff')
        else:
            del data[place : place + chance.randint(1, 40)]
    parsed_or_refused(bytes(data))


@settings(deadline=None)
@given(st.text(max_size=80), st.floats(0, 1e12))
def test_no_text_breaks_the_check(text: str, now: float) -> None:
    token, reason = check(text, TokenTable(CLUSTER), now)
    assert token is None
    assert reason == " ".join(reason.split())


def test_messages_do_not_quote_what_was_parsed() -> None:
    for data in (b'{"token": "gst_secret', b'{"gst_secret": 1, "gst_secret": 2}', b"gst_secret"):
        with pytest.raises(ConfigError) as caught:
            parse_object(data, 100, "x")
        assert "gst_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "good"),
    [("anna", True), ("a.b-c_d@e", True), ("0", True), ("", False), ("-a", False), ("a/b", False), ("a\n", False)],
)
def test_names(name: str, good: bool) -> None:
    assert is_name(name) is good


def test_times_for_people() -> None:
    assert utc(0) == "1970-01-01 00:00 UTC"
    assert utc(10**18) == "9999-12-31 23:59 UTC"


def test_only_a_newer_table_takes_the_place_of_another() -> None:
    """An older one would make tokens good again that were revoked since."""
    old = TokenTable(CLUSTER, (issued()[1],), 5)
    newer = dataclasses.replace(old, serial=6)
    assert succeeds(newer, old) == succeeds(old, old) == ""
    assert "is number 5 of its authority and the one in force here is number 6" in succeeds(old, newer)
    assert "does the authority exist twice?" in succeeds(dataclasses.replace(old, tokens=()), old)
    assert "is of cluster ffffffff" in succeeds(TokenTable("ffffffff", (), 9), old)


def test_holders_whose_last_token_ends_soon_are_named() -> None:
    day = 86_400
    table = TokenTable(
        CLUSTER,
        (
            issued("viewer", "ann", expires_at=NOW + 3 * day)[1],
            issued("worker", "renewed", expires_at=NOW + 1)[1],
            issued("worker", "renewed", expires_at=NOW + 300 * day)[1],
            issued("server", "s", expires_at=NOW + 13 * day)[1],
            issued("worker", "gone", expires_at=NOW + day, revoked_at=NOW)[1],
            issued("worker", "late", expires_at=NOW - day)[1],
            issued("worker", "forgotten", expires_at=NOW - 20 * day)[1],
        ),
    )
    lines = expiring(table, NOW)
    assert [line.split(";")[0].split(" on ")[0] for line in lines] == [
        "the credentials of worker 'late' expired",
        "the credentials of server 's' expire",
        "the credentials of viewer 'ann' expire",
    ]
    assert lines[0].endswith("renew it: `gradstream certs rotate DIR`")
