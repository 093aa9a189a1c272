"""`gradstream certs`, `login` and `logout`: their output, the place of credentials, and errors of one line."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gradstream.coordinator.cli import main
from gradstream.core.credentials.authority import Authority
from gradstream.core.credentials.store import from_pack, load, stored_for, to_pack

GRADSTREAM = [sys.executable, "-m", "gradstream.coordinator.cli"]
DAY = 86_400
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GRADSTREAM_AUTHORITY", "GRADSTREAM_DEBUG", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An authority's directory, which the environment names."""
    directory = tmp_path / "authority"
    with Authority.init(directory):
        pass
    monkeypatch.setenv("GRADSTREAM_AUTHORITY", str(directory))
    return directory


def give(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    """Let stdin be a pipe with this in it."""
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def run_json(arguments: list[str], capsys: Capture) -> Any:
    """The one JSON document on stdout of a command that succeeds."""
    capsys.readouterr()
    assert main([*arguments, "-o", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(arguments: list[str], capsys: Capture) -> str:
    """The one line on stderr of a command that ends with 2 and has no result."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def issue(capsys: Capture, role: str = "admin", name: str = "anna") -> str:
    """A pack."""
    capsys.readouterr()
    assert main(["certs", "issue", role, "--name", name]) == 0
    return capsys.readouterr().out


# ---- certs ---------------------------------------------------------------------------------------------------------


def test_init_makes_what_is_missing_and_says_so(tmp_path: Path, capsys: Capture) -> None:
    tokens = tmp_path / "public" / "tokens.json"
    arguments = ["certs", "init", str(tmp_path / "a"), "--tokens", str(tokens)]
    for role in ("admin", "worker"):
        arguments += ["--issue", f"{role}={tmp_path / role}"]
    made = run_json(arguments, capsys)
    assert made["cluster"] == load(tmp_path / "worker", time.time()).cluster
    assert (made["directory"], made["tokens"]) == (str(tmp_path / "a"), str(tokens))
    assert [(row["role"], row["directory"], row["action"]) for row in made["credentials"]] == [
        ("admin", str(tmp_path / "admin"), "issued"),
        ("worker", str(tmp_path / "worker"), "issued"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"cluster {made['cluster']}: authority in {tmp_path}/a, tokens in {tokens}\n")
    assert captured.out.count("kept") == 2
    assert "good until" in captured.out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_init_renews_what_expires_soon(authority: Path, tmp_path: Path, capsys: Capture) -> None:
    with Authority.open(authority) as opened:
        opened.issue("worker", "w", days=10, directory=tmp_path / "w")
    made = run_json(["certs", "init", str(authority), "--issue", f"worker={tmp_path}/w"], capsys)
    assert [row["action"] for row in made["credentials"]] == ["renewed"]
    assert load(tmp_path / "w", time.time()).name == "w"


def test_issue_prints_a_pack_and_nothing_else(authority: Path, capsys: Capture) -> None:
    found = from_pack(issue(capsys), time.time())
    assert (found.role, found.name) == ("admin", "anna")
    assert capsys.readouterr().err == ""


def test_issue_to_a_directory_and_show(authority: Path, tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "w"
    arguments = ["certs", "issue", "worker", "--name", "w-1", "--out", str(place), "--days", "3"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{place}\n"
    assert main(["certs", "show", str(place)]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip("\n") == to_pack(load(place, time.time()))
    assert captured.err == ""
    (place / "key.pem").chmod(0o644)
    assert main(["certs", "show", str(place)]) == 0
    assert "warning: others than its owner may read key.pem" in capsys.readouterr().err
    assert "already holds a credential" in refused(arguments, capsys)
    (place / "cert.pem").write_text("")
    assert "cert.pem in" in refused(["certs", "show", str(place)], capsys)


def test_init_stays_and_renews_what_expires_soon(tmp_path: Path) -> None:
    directory = tmp_path / "worker"
    arguments = ["certs", "init", str(tmp_path / "a"), "--issue", f"worker={directory}"]
    assert main(arguments) == 0
    # Good for a day, so always to be renewed.
    assert main(["certs", "rotate", str(directory), "--days", "1", "--authority", str(tmp_path / "a")]) == 0
    seen = {(directory / "cert.pem").read_bytes()}
    process = subprocess.Popen(
        [*GRADSTREAM, *arguments, "--every-hours", "0.00001"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while len(seen) < 4:
            assert time.monotonic() < deadline
            assert process.poll() is None
            seen.add((directory / "cert.pem").read_bytes())
            time.sleep(0.01)
    finally:
        process.terminate()
        process.wait()
    load(directory, time.time())


def test_ls_shows_all_tokens_and_no_secret(authority: Path, capsys: Capture) -> None:
    assert main(["certs", "ls"]) == 0
    assert "no tokens yet" in capsys.readouterr().err
    assert run_json(["certs", "ls"], capsys) == []
    pack = json.loads(issue(capsys))
    with Authority.open(authority, lambda: time.time() - 2 * DAY) as opened:
        opened.issue("viewer", "late", days=1)
        opened.issue("worker", "w")
    assert main(["certs", "revoke", "w"]) == 0
    revoked = capsys.readouterr().out
    rows = run_json(["certs", "ls"], capsys)
    assert [(row["role"], row["name"], row["state"]) for row in rows] == [
        ("admin", "anna", "good"),
        ("viewer", "late", "expired"),
        ("worker", "w", "revoked"),
    ]
    assert revoked == f"revoked token {rows[2]['id']} of worker 'w'\n"
    assert set(rows[0]) == {"id", "role", "name", "issued_at", "expires_at", "revoked_at", "state"}
    assert main(["certs", "ls"]) == 0
    text = capsys.readouterr().out
    assert pack["token"].split("_")[2] in text
    assert pack["token"].split("_", 3)[3] not in text
    assert "good, 89 d 23 h left" in text
    assert "revoked " in text


def test_ls_works_while_another_process_writes(authority: Path, capsys: Capture) -> None:
    with Authority.open(authority):
        assert run_json(["certs", "ls"], capsys) == []
        assert "another `gradstream certs`" in refused(["certs", "issue", "admin", "--name", "a"], capsys)


def test_revoking_again_and_what_is_not_there(authority: Path, capsys: Capture) -> None:
    issue(capsys)
    assert [row["state"] for row in run_json(["certs", "revoke", "anna"], capsys)] == ["revoked"]
    assert run_json(["certs", "revoke", "anna"], capsys) == []
    assert main(["certs", "revoke", "anna"]) == 0
    assert "no token of 'anna' was good any more" in capsys.readouterr().err
    assert refused(["certs", "revoke", "ana"], capsys) == "no token has the name or id 'ana'; did you mean 'anna'?"


def test_rotate_renews_in_place(authority: Path, tmp_path: Path, capsys: Capture) -> None:
    places = [tmp_path / name for name in ("w", "s")]
    with Authority.open(authority) as opened:
        for place in places:
            opened.issue("worker", place.name, directory=place)
    before = [load(place, time.time()) for place in places]
    assert main(["certs", "rotate", *map(str, places), "--days", "5", "--grace-minutes", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [
        line.startswith(f"{place}: worker '{place.name}' renewed, good until")
        for line, place in zip(lines, places, strict=True)
    ]
    for place, old in zip(places, before, strict=True):
        found = load(place, time.time())
        assert found.token != old.token
        assert abs(found.expires_at - time.time() - 5 * DAY) < 60
    assert [row["state"] for row in run_json(["certs", "ls"], capsys)] == ["expired"] * 2 + ["good"] * 2


def test_rotating_the_ca_in_two_steps(authority: Path, tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "w"
    with Authority.open(authority) as opened:
        opened.issue("worker", "w", directory=place)
        opened.issue("viewer", "anna")
    made = run_json(["certs", "rotate", "--ca", str(place)], capsys)
    assert [row["name"] for row in made["credentials"]] == ["w"]
    assert [row["name"] for row in made["awaited"]] == ["anna"]
    assert load(place, time.time()).ca.count(b"BEGIN") == 2
    assert main(["certs", "rotate", str(place)]) == 0
    assert "before `gradstream certs rotate --ca --finish`, renew or revoke: viewer 'anna'" in capsys.readouterr().err
    assert "viewer 'anna'" in refused(["certs", "rotate", "--ca", "--finish", str(place)], capsys)
    assert "under way" in refused(["certs", "rotate", "--ca"], capsys)
    assert main(["certs", "revoke", "anna"]) == 0
    assert main(["certs", "rotate", str(place)]) == 0
    assert "end the rotation with `gradstream certs rotate --ca --finish`" in capsys.readouterr().err
    assert main(["certs", "rotate", "--ca", "--finish", str(place)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{place}: worker 'w' trusts only the new CA")
    assert "the old CA is dropped" in captured.err
    assert load(place, time.time()).ca.count(b"BEGIN") == 1


def test_a_ca_that_nears_its_end_is_warned_of(tmp_path: Path, capsys: Capture) -> None:
    with Authority.init(tmp_path / "a", clock=lambda: time.time() - 3300 * DAY):
        pass
    assert main(["certs", "ls", "--authority", str(tmp_path / "a")]) == 0
    assert "warning: the CA expires on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["certs", "ls"], "which authority? add --authority DIR, or set GRADSTREAM_AUTHORITY"),
        (["certs", "issue", "admin", "--name", "a"], "which authority?"),
        (["certs", "ls", "--authority", "nowhere"], "/nowhere; `gradstream certs init"),
        (["certs", "show", "nowhere"], "there is no directory"),
        (["certs", "init", "/dev/null/x"], "cannot be written"),
        (["certs", "init", "a", "--issue", "worker"], "'worker' is not of the form ROLE=DIR"),
        (["certs", "init", "a", "--issue", "=w"], "no such role; roles are viewer, submitter"),
        (["certs", "init", "a", "--issue", "wroker=w"], "no such role; did you mean 'worker'?"),
        (["certs", "init", "a", "--issue", "worker=a/../a"], "is the authority's own directory"),
        (["certs", "init", "a", "--issue", "worker=/dev/null/w"], "/dev/null/w cannot be written (Not a directory)"),
        (["certs", "init", "a", "--tokens", "/dev/null/t"], "/dev/null cannot be written (Not a directory)"),
        (["certs", "rotate", "--authority", "a"], "name credential directories, or add --ca"),
        (["certs", "rotate", "--finish", "--authority", "a"], "add --ca"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["issue", "wroker", "--name", "w"], "did you mean 'worker'?"),
        (["issue", "worker", "--name", "a b"], "cannot be a name"),
        (["issue", "worker", "--name", "w", "--days", "4000"], "1 to 3650 days"),
        (["issue", "worker", "--name", "w", "--out", "/dev/null/w"], "cannot be written"),
        (["rotate", "nowhere"], "there is no directory"),
        (["revoke", "nobody"], "`gradstream certs ls` lists them"),
    ],
)
def test_what_the_authority_refuses_is_one_line(
    arguments: list[str],
    message: str,
    authority: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(["certs", *arguments], capsys)


# ---- login and logout ----------------------------------------------------------------------------------------------


def test_login_and_logout(authority: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    pack = issue(capsys)
    addresses = ["10.0.0.1:7000", "localhost:7001"]
    give(monkeypatch, pack)
    assert main(["login", *addresses]) == 0
    captured = capsys.readouterr()
    cluster = json.loads(pack)["token"].split("_")[1]
    assert captured.out.startswith(f"logged in to 10.0.0.1:7000 as admin 'anna' of cluster {cluster}, until ")
    assert captured.out.count("\n") == 2
    assert captured.err == ""
    for address in (*addresses, "127.0.0.1:7001"):
        place = stored_for(address)
        assert place is not None
        assert to_pack(load(place, time.time())) == pack.rstrip("\n")
        assert place.stat().st_mode & 0o777 == 0o700
    # Another pack takes the place of the first.
    second = issue(capsys, "viewer", "bert")
    give(monkeypatch, second)
    assert main(["login", addresses[0]]) == 0
    place = stored_for(addresses[0])
    assert place is not None
    assert load(place, time.time()).name == "bert"
    capsys.readouterr()
    assert main(["logout", addresses[0]]) == 0
    assert capsys.readouterr().out == "logged out of 10.0.0.1:7000\n"
    assert stored_for(addresses[0]) is None
    text = refused(["logout", addresses[0]], capsys)
    assert text == "no credentials are stored for 10.0.0.1:7000; there are some for 127.0.0.1:7001"
    assert main(["logout", "127.0.0.1:7001", "localhost:7001"]) == 0
    assert refused(["logout", addresses[1]], capsys).endswith("there are none at all")


def test_a_login_is_whole_or_not_at_all(authority: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    pack = issue(capsys)
    document = json.loads(pack)
    with Authority.open(authority, lambda: time.time() - 9 * DAY) as opened:
        expired = to_pack(opened.issue("viewer", "late", days=1))
    worker = issue(capsys, "worker", "w")
    cases: list[tuple[str | bytes, str]] = [
        ("", "no pack came on stdin; pipe one: gradstream certs show DIR | gradstream login h:1"),
        ("\n", "no pack came on stdin"),
        ("hello", "the pack on stdin is damaged: no JSON at line 1, column 1"),
        (b"\xff\xfe", "the pack on stdin is damaged"),
        (pack[:500], "the pack on stdin is damaged"),
        ("x" * 300_000, "the pack on stdin has more than 262144 bytes"),
        (json.dumps({**document, "key": document["cert"]}), "key.pem in the pack on stdin is not a private key"),
        (json.dumps({**document, "token": "x"}), "the token in the pack on stdin is malformed"),
        (json.dumps({**document, "ca": json.loads(worker)["cert"]}), "is not signed by the CA"),
        (expired, "the certificate of viewer 'late' in the pack on stdin expired on"),
        (worker, "the pack on stdin is a worker's, and login is for people"),
    ]
    for text, message in cases:
        give(monkeypatch, text)
        assert message in refused(["login", "h:1"], capsys)
    give(monkeypatch, pack)
    assert "'nonsense' is not an address" in refused(["login", "h:1", "nonsense"], capsys)
    assert stored_for("h:1") is None


def test_a_pack_goes_through_a_pipe(authority: Path, tmp_path: Path) -> None:
    pipe = f"{' '.join(GRADSTREAM)} certs issue viewer --name anna | {' '.join(GRADSTREAM)} login 127.0.0.1:7000"
    result = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.startswith("logged in to 127.0.0.1:7000 as viewer 'anna'")
    assert result.stderr.startswith("takes effect once it is published: gradstream certs publish HOST:PORT")
    assert result.stderr.count("\n") == 1
    # When the first fails, its line is there, and the second says that nothing came.
    broken = pipe.replace("viewer", "veiwer")
    result = subprocess.run(["bash", "-c", broken], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert sorted(line.split()[:3] for line in result.stderr.splitlines()) == [
        ["error:", "no", "pack"],
        ["error:", "there", "is"],
    ]


def test_a_pack_can_be_pasted(authority: Path, capsys: Capture) -> None:
    """On a terminal: the command says what it waits for, and goes on when the pack is whole, without Ctrl-D."""
    pack = issue(capsys)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*GRADSTREAM, "login", "127.0.0.1:7000"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(theirs)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("paste the pack, or pipe one: ")
        os.write(ours, pack.encode())
        out, err = process.communicate(timeout=60)
        os.close(ours)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("logged in to 127.0.0.1:7000 as admin 'anna'")
