"""Credentials: every error in a directory or a pack is one line with its remedy."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstream.core.credentials import store
from gradstream.core.credentials.authority import Authority
from gradstream.core.credentials.store import Credentials, from_pack, load, save, to_pack
from gradstream.core.credentials.tokens import new_token, utc
from gradstream.core.errors import ConfigError, one_line

NOW = 1_800_000_000
DAY = 86_400


def authority(directory: Path, now: float = NOW) -> Authority:
    return Authority.init(directory, clock=lambda: now)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    """A worker's credential."""
    with authority(tmp_path_factory.mktemp("authority")) as opened:
        return opened.issue("worker", "w")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    """A worker's credential of another cluster."""
    with authority(tmp_path_factory.mktemp("other")) as opened:
        return opened.issue("worker", "w")


@pytest.fixture
def directory(made: Credentials, tmp_path: Path) -> Path:
    """A credential directory."""
    save(tmp_path / "w", made)
    return tmp_path / "w"


def refusal(run: Callable[[], object]) -> str:
    """The one line of the ConfigError that `run` raises."""
    with pytest.raises(ConfigError) as caught:
        run()
    assert str(caught.value) == one_line(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_what_was_saved_is_loaded(made: Credentials, directory: Path) -> None:
    found = load(str(directory), NOW)
    assert (found.ca, found.cert, found.key, found.token) == (made.ca, made.cert, made.key, made.token)
    assert (found.role, found.name, found.cluster) == ("worker", "w", made.token.split("_")[1])
    assert (found.expires_at, found.lifetime_seconds) == (NOW + 365 * DAY, 365 * DAY)
    assert found.source == str(directory)
    assert found.warnings == ()


def test_only_the_owner_may_read_them(directory: Path) -> None:
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == dict.fromkeys(store.FILES, 0o600)


def test_a_secret_that_others_may_read_is_warned_of(directory: Path) -> None:
    (directory / "key.pem").chmod(0o640)
    (directory / "cert.pem").chmod(0o644)
    assert load(directory, NOW).warnings == (f"others than its owner may read key.pem in {directory}; chmod 600 it",)
    (directory / "token").chmod(0o604)
    assert "may read key.pem and token in" in load(directory, NOW).warnings[0]


def test_secrets_are_not_in_a_repr(made: Credentials) -> None:
    assert made.token not in repr(made)
    assert "PRIVATE KEY" not in repr(made)


@pytest.mark.parametrize("name", store.FILES)
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert refusal(lambda: load(directory, NOW)).startswith(
        f"{directory} has no {name}; a credential directory is made"
    )


def test_a_missing_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"there is no directory {tmp_path}/x; " in refusal(lambda: load(tmp_path / "x", NOW))
    assert f"{tmp_path}/file is not a directory; " in refusal(lambda: load(tmp_path / "file", NOW))


@pytest.mark.parametrize("name", store.FILES)
def test_a_file_that_cannot_be_read(directory: Path, name: str) -> None:
    path = directory / name
    path.unlink()
    path.symlink_to(path.name)
    assert f"{path} cannot be read (Too many levels of symbolic links); let user" in refusal(
        lambda: load(directory, NOW)
    )
    path.unlink()
    path.mkdir()
    assert refusal(lambda: load(directory, NOW)) == f"{path} is not a file; remove it"
    path.rmdir()
    os.mkfifo(path)  # which nobody writes: reading must not wait
    assert refusal(lambda: load(directory, NOW)) == f"{path} is not a file; remove it"
    path.unlink()
    path.write_bytes(b" " * (store.MAX_FILE_BYTES + 1))
    assert f"{path} has more than 65536 bytes" in refusal(lambda: load(directory, NOW))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(directory: Path) -> None:
    (directory / "key.pem").chmod(0)
    assert "key.pem cannot be read (Permission denied); let user" in refusal(lambda: load(directory, NOW))


NOT_PEM = [
    b"",
    b"hello",
    b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    b"\xff\x00",
]


@pytest.mark.parametrize("content", NOT_PEM)
@pytest.mark.parametrize(
    ("name", "what"), [("ca.pem", "a certificate"), ("cert.pem", "a certificate"), ("key.pem", "a private key")]
)
def test_what_is_not_pem(directory: Path, name: str, what: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    assert refusal(lambda: load(directory, NOW)) == (
        f"{name} in {directory} is not {what} in PEM form; copy the credentials again"
    )


@pytest.mark.parametrize("content", [b"", b"gst_", b"a b", b"\xff" * 10, b"gst_00000000_00000000_" + b"a" * 42])
def test_what_is_not_a_token(directory: Path, content: bytes) -> None:
    (directory / "token").write_bytes(content)
    text = refusal(lambda: load(directory, NOW))
    assert text == f"the token in {directory} is malformed or cut off; copy the credentials again"


def test_parts_of_two_credentials(made: Credentials, other: Credentials) -> None:
    def parts(**changes: Any) -> str:
        return refusal(lambda: from_pack(to_pack(dataclasses.replace(made, **changes)), NOW))

    assert parts(key=other.key) == (
        "key.pem in the pack is not the key of cert.pem; copy both again from where they were issued"
    )
    assert parts(ca=other.ca).startswith("cert.pem in the pack is not signed by the CA in ca.pem; copy all files")
    assert parts(token=other.token) == (
        f"the token in the pack is of cluster {other.cluster} and its certificate of cluster {made.cluster}; "
        f"copy all files of one credential"
    )
    # A CA's name is not enough to pass for it.
    assert "not signed" in parts(cert=other.cert, key=other.key)
    # The CA's own certificate is nobody's credential.
    assert "cert.pem in the pack was not made by `gradstream certs`" in parts(cert=made.ca)


def test_a_certificate_beyond_its_time(made: Credentials, directory: Path) -> None:
    ends = made.expires_at
    load(directory, ends - 1)
    assert refusal(lambda: load(directory, ends)) == (
        f"the certificate of worker 'w' in {directory} expired on {utc(ends)} (this machine's clock says {utc(ends)}); "
        f"renew it: `gradstream certs rotate {directory}`"
    )
    # Clocks may differ by an hour; where one is far behind, it is the clock.
    load(directory, NOW - 3600)
    assert refusal(lambda: load(directory, NOW - DAY)) == (
        f"the certificate of worker 'w' in {directory} is valid from {utc(NOW - 3600)} on and this machine's clock "
        f"says {utc(NOW - DAY)}; set the clock right"
    )


def test_a_persons_certificate_beyond_its_time(tmp_path: Path) -> None:
    with authority(tmp_path) as opened:
        pack = to_pack(opened.issue("admin", "anna", days=1))
    text = refusal(lambda: from_pack(pack, NOW + 2 * DAY))
    assert f"admin 'anna' in the pack expired on {utc(NOW + DAY)}" in text
    assert "have a new one issued: `gradstream certs issue admin --name anna`" in text


def test_a_ca_beyond_its_time(tmp_path: Path) -> None:
    from gradstream.core.credentials import certificates

    ca = certificates.new_ca("0a1b2c3d", NOW, DAY)
    cert, key = certificates.new_leaf(ca, "0a1b2c3d", "worker", "w", NOW, NOW + 9 * DAY)
    short = Credentials(ca.certificate, cert, key, new_token("0a1b2c3d")[0], "x")
    text = refusal(lambda: from_pack(to_pack(short), NOW + 2 * DAY))
    assert f"the CA certificate in the pack expired on {utc(NOW + DAY)}" in text
    assert "certs rotate --ca" in text


@pytest.mark.parametrize(
    ("role", "name", "cluster"), [("root", "w", "0a1b2c3d"), ("worker", "a b", "0a1b2c3d"), ("worker", "w", "example")]
)
def test_a_certificate_that_was_made_elsewhere(role: str, name: str, cluster: str) -> None:
    from gradstream.core.credentials import certificates

    ca = certificates.new_ca(cluster, NOW, DAY)
    cert, key = certificates.new_leaf(ca, cluster, role, name, NOW, NOW + DAY)
    foreign = Credentials(ca.certificate, cert, key, new_token("0a1b2c3d")[0], "x")
    text = refusal(lambda: from_pack(to_pack(foreign), NOW))
    assert text == "cert.pem in the pack was not made by `gradstream certs`; only that command issues credentials"
    assert "was not made by" in refusal(lambda: foreign.role)


def test_a_pack_holds_the_same(made: Credentials) -> None:
    pack = to_pack(made)
    assert pack.isprintable()
    assert len(pack) < 4096, "a terminal takes no longer line"
    assert dataclasses.replace(from_pack(f"{pack}\r\n".encode(), NOW), source=made.source) == made


def test_what_is_not_a_pack(made: Credentials) -> None:
    whole = json.loads(to_pack(made))

    def pack(**changes: Any) -> str:
        return refusal(lambda: from_pack(json.dumps({**whole, **changes}), NOW))

    assert pack(gradstream_credentials=2).endswith("update gradstream")
    assert pack(gradstream_credentials=True) == "the pack is damaged: 'gradstream_credentials' is a bool"
    assert pack(key=None) == "the pack is damaged: 'key' is a NoneType"
    assert "keys that gradstream does not know" in pack(more="")
    assert "is not a certificate in PEM form" in pack(cert="\ud800")
    assert "the token in the pack is malformed" in pack(token="x")
    for name in whole:
        lacking = json.dumps({key: value for key, value in whole.items() if key != name})
        assert refusal(lambda text=lacking: from_pack(text, NOW)) == f"the pack is damaged: it has no '{name}'"
    assert "no JSON at line 1" in refusal(lambda: from_pack("", NOW))
    assert "no JSON at line 1" in refusal(lambda: from_pack(to_pack(made)[:-9], NOW))
    assert "not a JSON object" in refusal(lambda: from_pack("[1]", NOW))
    assert "more than 262144 bytes" in refusal(lambda: from_pack(" " * 300_000, NOW))


def accepted_or_refused(pack: bytes | str) -> None:
    """Nothing but a ConfigError on one line, which quotes no secret, comes of a pack that is not good."""
    message = ""
    try:
        from_pack(pack, NOW)
    except ConfigError as error:
        message = str(error)
    assert message == " ".join(message.split())
    assert "PRIVATE" not in message
    assert not re.search("gst_.{30}", message)


PART = st.text(max_size=30) | st.none() | st.integers() | st.sampled_from([pem.decode("latin1") for pem in NOT_PEM])


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.fixed_dictionaries(
        {"gradstream_credentials": st.just(1) | st.integers()},
        optional={"ca": PART, "cert": PART, "key": PART, "token": PART, "other": PART},
    ).map(json.dumps)
)
def test_no_bytes_break_the_packs_parser(pack: bytes | str) -> None:
    accepted_or_refused(pack)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["ca", "cert", "key"]))
def test_no_altered_certificate_breaks_the_packs_parser(made: Credentials, seed: int, name: str) -> None:
    """Damage inside the base64, which a checksum would find and PEM has none."""
    chance = random.Random(seed)
    document = json.loads(to_pack(made))
    first, *lines, last = document[name].strip().split("\n")
    der = bytearray(base64.b64decode("".join(lines)))
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(der))
        if chance.random() < 0.7:
            der[place] = chance.randrange(256)
        else:
            del der[place : place + chance.randint(1, 4)]
    document[name] = "\n".join([first, base64.b64encode(bytes(der)).decode(), last])
    accepted_or_refused(json.dumps(document))


def test_the_fingerprint_changes_when_they_are_replaced(directory: Path, made: Credentials, other: Credentials) -> None:
    before = store.fingerprint(directory)
    assert store.fingerprint(directory) == before
    save(directory, other)
    after = store.fingerprint(directory)
    assert after != before
    (directory / "token").unlink()
    assert store.fingerprint(directory) not in (before, after)
    assert store.fingerprint(directory / "nowhere") == store.fingerprint(directory / "nothing")


def test_who_loads_while_they_are_replaced_has_the_old_or_the_new(
    directory: Path, made: Credentials, other: Credentials
) -> None:
    done = threading.Event()
    failures: list[str] = []
    seen: set[str] = set()

    def reader() -> None:
        while not done.is_set():
            try:
                seen.add(load(directory, NOW).cluster)
            except ConfigError as error:
                failures.append(str(error))

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        for _ in range(40):
            for each in (other, made):
                save(directory, each)
    finally:
        done.set()
        thread.join()
    assert failures == []
    assert seen <= {made.cluster, other.cluster}
    assert seen
    assert sorted(path.name for path in directory.iterdir()) == sorted(store.FILES)


def test_who_holds_the_directorys_lock_holds_nobody_up(directory: Path, other: Credentials) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        started = time.monotonic()
        save(directory, other)
        assert load(directory, NOW).cluster == other.cluster
        assert time.monotonic() - started < 10
    finally:
        os.close(descriptor)


def test_a_directory_that_cannot_be_written(made: Credentials, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(lambda: save(tmp_path / "file" / "x", made))
    assert text.startswith(f"{tmp_path}/file/x cannot be written (Not a directory); let user")
    assert "or choose another" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_leaves_files_to_the_owner_of_the_directory(directory: Path, other: Credentials) -> None:
    os.chown(directory, 12345, 12346)
    save(directory, other)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in directory.iterdir()} == {(12345, 12346)}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.1:7000", "10.0.0.1_7000"),
        ("Host.example:7001", "host.example_7001"),
        ("localhost:7000", "127.0.0.1_7000"),
        ("[::1]:7000", "::1_7000"),
    ],
)
def test_where_credentials_for_an_address_are(
    address: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    place = tmp_path / "gradstream" / "credentials" / name
    assert store.store_for(address) == place
    assert store.stored_for(address) is None
    place.mkdir(parents=True)
    assert store.stored_for(address) == place


def test_without_xdg_they_are_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / ".config" / "gradstream" / "credentials" / "h_1"
    for value in ("", "relative"):
        assert store.store_for("h:1", {"XDG_CONFIG_HOME": value}) == place
    assert store.store_for("h:1", {}) == place


@pytest.mark.parametrize("address", ["", "h", "h:", ":1", "h:0", "h:65536", "../x:1", "a/b:1", "h:1:2", "é:1", "a b:1"])
def test_what_is_no_address(address: str) -> None:
    assert "is not an address of the form host:port" in refusal(lambda: store.store_for(address))


def test_cryptography_is_imported_when_it_is_needed() -> None:
    modules = [
        "core.credentials.store",
        "core.credentials.tokens",
        "core.credentials.authority",
        "coordinator.cli.certs",
        "coordinator.cli.login",
    ]
    imports = "; ".join(f"import gradstream.{module}" for module in modules)
    code = (
        f"import sys; {imports}; print([name for name in ('cryptography', 'fsspec', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_what_is_missing_is_said_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    refusal(lambda: load(tmp_path, NOW))
    assert time.monotonic() - started < 1
