"""The authority: its credentials work in real TLS, its state is durable, and a rotation needs no pause."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstream.core.credentials import authority as authority_module
from gradstream.core.credentials import store
from gradstream.core.credentials.authority import Authority, upkeep
from gradstream.core.credentials.authority_files import Record, read_record
from gradstream.core.credentials.store import Credentials, dns_name, load
from gradstream.core.credentials.tokens import PEOPLE_ROLES, ROLES, Token, TokenTable, check, utc
from gradstream.core.errors import ConfigError, one_line

NOW = 1_800_000_000
DAY = 86_400


class Clock:
    """A clock that stands until it is set."""

    def __init__(self, now: float = NOW):
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the authority is."""
    return tmp_path / "authority"


def table(directory: Path) -> TokenTable:
    """The token table as services read it."""
    return TokenTable.parse((directory / "tokens.json").read_bytes())


def refusal(run: Callable[[], object]) -> str:
    """The one line of the ConfigError that `run` raises."""
    with pytest.raises(ConfigError) as caught:
        run()
    assert str(caught.value) == one_line(caught.value)
    return str(caught.value)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock"}


# ---- Issuing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_each_role_gets_its_time(role: str, place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        made = authority.issue(role, "anna", directory=tmp_path / "out")
        short = authority.issue(role, "anna", days=7)
    days = 90 if role in PEOPLE_ROLES else 365
    assert (made.role, made.name, made.expires_at) == (role, "anna", NOW + days * DAY)
    assert short.expires_at == NOW + 7 * DAY
    assert dataclasses.replace(load(tmp_path / "out", NOW), source=made.source) == made
    token, reason = check(made.token, table(place), NOW)
    assert token is not None, reason
    assert (token.role, token.name, token.issued_at, token.expires_at) == (role, "anna", NOW, made.expires_at)
    assert token.id != check(short.token, table(place), NOW)[0].id  # type: ignore[union-attr]


def test_secrets_are_for_the_owner_alone_and_not_in_the_table(place: Path, clock: Clock) -> None:
    with Authority.init(place, clock=clock) as authority:
        made = authority.issue("admin", "anna")
        assert place.stat().st_mode & 0o777 == 0o700
    assert {name: (place / name).stat().st_mode & 0o777 for name in files_of(place)} == {
        "ca.pem": 0o600,
        "ca-key.pem": 0o600,
        "authority.json": 0o600,
        "tokens.json": 0o600,
    }
    assert made.token[-43:] not in (place / "tokens.json").read_text()


def test_no_credential_outlives_its_ca(place: Path, clock: Clock) -> None:
    with Authority.init(place, clock=clock) as authority:
        assert authority.ca_expires_at == NOW + 3650 * DAY
        clock.now = NOW + 3600 * DAY
        assert authority.issue("worker", "w").expires_at == authority.ca_expires_at
        clock.now = authority.ca_expires_at
        text = refusal(lambda: authority.issue("worker", "w"))
        assert f"expired on {utc(clock.now)} (this machine's clock says {utc(clock.now)}); renew it" in text
        # A new CA mends it.
        authority.rotate_ca()
        assert authority.issue("worker", "w").expires_at == clock.now + 365 * DAY


@pytest.mark.parametrize(
    ("role", "name", "days", "message"),
    [
        ("wroker", "w", None, "no role 'wroker'; did you mean 'worker'?"),
        ("x", "w", None, "; roles are viewer, submitter, admin, worker, server, coordinator, fine-tuning"),
        ("worker", "", None, "'' cannot be a name"),
        ("worker", "a b", None, "'a b' cannot be a name"),
        ("worker", "deadbeef", None, "does not look like a token's id"),
        ("worker", "w", 0, "good for 1 to 3650 days, not for 0"),
        ("worker", "w", 3651, "good for 1 to 3650 days, not for 3651"),
    ],
)
def test_what_cannot_be_issued(role: str, name: str, days: int | None, message: str, place: Path, clock: Clock) -> None:
    with Authority.init(place, clock=clock) as authority:
        assert message in refusal(lambda: authority.issue(role, name, days))
        assert authority.tokens() == ()


def test_a_directory_that_holds_a_credential_is_not_written_over(place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        authority.issue("worker", "w", directory=tmp_path / "w")
        text = refusal(lambda: authority.issue("admin", "a", directory=tmp_path / "w"))
        assert f"{tmp_path}/w already holds a credential (ca.pem); renew it with `gradstream certs rotate`" in text


def test_a_directory_that_cannot_be_written_leaves_no_token(place: Path, clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Authority.init(place, clock=clock) as authority:
        assert "cannot be written" in refusal(lambda: authority.issue("worker", "w", directory=tmp_path / "file" / "w"))
        assert authority.tokens() == ()
    assert table(place).tokens == ()


# ---- The directory -------------------------------------------------------------------------------------------------


def test_init_again_changes_nothing(place: Path, clock: Clock) -> None:
    with Authority.init(place, clock=clock) as authority:
        authority.issue("worker", "w")
    before = files_of(place)
    with Authority.init(place, clock=clock):
        pass
    assert files_of(place) == before


def test_each_change_is_published_where_init_was_told(
    place: Path, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "public" / "tokens.json"
    with Authority.init(place, elsewhere, clock=clock) as authority:
        authority.issue("worker", "w")
    assert len(TokenTable.parse(elsewhere.read_bytes()).tokens) == 1
    # The authority's own table is as new: what was published is a copy of it.
    assert (place / "tokens.json").read_bytes() == elsewhere.read_bytes()
    # The operator lets the coordinator, another user, read it.
    elsewhere.chmod(0o644)
    with Authority.open(place, clock=clock) as authority:
        authority.revoke("w")
    assert elsewhere.stat().st_mode & 0o777 == 0o644
    # The same place by another way, and another place.
    monkeypatch.chdir(tmp_path)
    with Authority.init(Path("authority"), Path("authority/../public/tokens.json"), clock=clock):
        pass
    text = refusal(lambda: Authority.init(place, place / "tokens.json", clock=clock))
    assert f"publishes its tokens to {elsewhere} and not to {place}/tokens.json; leave --tokens out" in text


def test_a_table_is_published_only_where_a_coordinator_may_read_it(place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority, Authority.init(tmp_path / "other", clock=clock) as other:
        for role in ("coordinator", "worker"):
            authority.issue(role, role, directory=tmp_path / role)
        assert authority.publish(tmp_path / "coordinator") == tmp_path / "coordinator" / "tokens.json"
        assert "worker holds the credentials of worker 'worker'" in refusal(
            lambda: authority.publish(tmp_path / "worker")
        )
        assert "only the coordinator of cluster" in refusal(lambda: other.publish(tmp_path / "coordinator"))
        assert not (tmp_path / "worker" / "tokens.json").exists()
        # Where no credentials are, a coordinator may read it all the same.
        (tmp_path / "public").mkdir()
        authority.publish(tmp_path / "public")
        authority.publish(tmp_path / "public" / "table.json")


def test_one_writer_at_a_time_and_any_readers(place: Path, clock: Clock) -> None:
    with Authority.init(place, clock=clock) as authority:
        authority.issue("worker", "w")
        for run in (Authority.init, Authority.open):
            text = refusal(lambda run=run: run(place))
            assert f"another `gradstream certs` (process {os.getpid()}) holds" in text
        with Authority.open(place, read_only=True) as reader:
            assert [token.name for token in reader.tokens()] == ["w"]
    with Authority.open(place) as authority:
        assert len(authority.tokens()) == 1


@pytest.mark.parametrize("step", ["key", "ca", "table"])
def test_an_init_that_was_cut_short_is_done_again(step: str, place: Path, clock: Clock) -> None:
    with Authority.init(place, clock=clock) as authority:
        cluster = authority.cluster
    (place / "authority.json").unlink()
    if step != "table":
        (place / "tokens.json").unlink()
    if step == "key":
        (place / "ca.pem").unlink()
    with Authority.init(place, clock=clock) as authority:
        assert (authority.cluster == cluster) is (step != "key")
        authority.issue("worker", "w")


def test_there_is_no_authority(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        text = refusal(lambda directory=directory: Authority.open(directory))
        assert text == f"there is no authority in {directory}; `gradstream certs init {directory}` makes one"
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_an_authoritys(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(lambda: Authority.init(tmp_path / "file" / "x"))
    assert "x cannot be written" in text
    with Authority.init(tmp_path / "a", clock=clock) as authority:
        authority.issue("worker", "w", directory=tmp_path / "w")
    text = refusal(lambda: Authority.init(tmp_path / "w"))
    assert text == f"{tmp_path}/w has a ca.pem without its key, so it is not an authority; choose another directory"


def damage(directory: Path, name: str, content: bytes | None) -> str:
    """What `open` says when a file of the authority is replaced or, with None, removed."""
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    return refusal(lambda: Authority.open(directory))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ca.pem", None, "ca.pem of the authority in {0} is missing; restore it from a backup"),
        ("ca-key.pem", None, "ca-key.pem of the authority in {0} is missing; restore it from a backup"),
        ("ca.pem", b"x", "ca.pem and ca-key.pem in {0} are damaged or not of one CA; restore both from a backup"),
        ("ca-key.pem", b"x", "ca.pem and ca-key.pem in {0} are damaged or not of one CA; restore both from a backup"),
        ("authority.json", b"{", "{0}/authority.json is damaged: no JSON at line 1, column 2"),
        ("authority.json", b"{}", "{0}/authority.json is damaged: it has no 'gradstream_authority'"),
        ("tokens.json", None, "the token table {0}/tokens.json is missing; restore it, or let `gradstream certs init"),
        ("tokens.json", b"[]", "{0}/tokens.json is damaged: not a JSON object"),
    ],
)
def test_a_damaged_authority(name: str, content: bytes | None, message: str, place: Path, clock: Clock) -> None:
    with Authority.init(place, clock=clock):
        pass
    assert damage(place, name, content).startswith(message.format(place))


def test_files_of_another_cluster(tmp_path: Path, clock: Clock) -> None:
    with Authority.init(tmp_path / "a", clock=clock) as one, Authority.init(tmp_path / "b", clock=clock) as two:
        pass
    text = damage(tmp_path / "a", "tokens.json", (tmp_path / "b" / "tokens.json").read_bytes())
    assert f"is the token table of cluster {two.cluster}, and the authority in {tmp_path}/a is of cluster" in text
    assert one.cluster in text
    assert "not of one CA" in damage(tmp_path / "a", "ca.pem", (tmp_path / "b" / "ca.pem").read_bytes())
    text = damage(tmp_path / "a", "ca-key.pem", (tmp_path / "b" / "ca-key.pem").read_bytes())
    assert f"has the CA of cluster {two.cluster} and the record of cluster {one.cluster}; restore both" in text


RECORD = {"gradstream_authority": 1, "cluster": "0a1b2c3d", "tokens": "tokens.json", "awaited": ["0a1b2c3d"]}
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=8) | st.integers())


@settings(deadline=None)
@given(
    st.binary(max_size=100)
    | st.builds(lambda k, v: json.dumps({**RECORD, k: v}).encode(), st.sampled_from([*RECORD, "x"]), VALUES)
)
def test_no_bytes_break_the_records_parser(data: bytes) -> None:
    message = ""
    try:
        record = Record.parse(data, "authority.json")
        assert Record.parse(record.serialize(), "") == record
    except ConfigError as error:
        message = str(error)
    assert message == " ".join(message.split())


# ---- Renewing and revoking -----------------------------------------------------------------------------------------


def test_a_renewal_replaces_both_and_the_old_token_has_an_hour(place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        old = authority.issue("worker", "w", days=20, directory=tmp_path / "w")
        clock.now += 5 * DAY
        new = authority.renew(tmp_path / "w")
    assert dataclasses.replace(load(tmp_path / "w", clock.now), source=new.source) == new
    assert (new.role, new.name, new.expires_at) == ("worker", "w", clock.now + 20 * DAY)
    assert new.cert != old.cert
    assert new.key != old.key
    for credential, seconds, good in [(old, 3599, True), (old, 3600, False), (new, 3600, True)]:
        token, reason = check(credential.token, table(place), clock.now + seconds)
        assert (token is not None) is good, reason


def test_grace_and_days_can_be_chosen(place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        old = authority.issue("worker", "w", directory=tmp_path / "w")
        new = authority.renew(tmp_path / "w", grace_seconds=0, days=3)
        assert new.expires_at == NOW + 3 * DAY
        assert "expired" in check(old.token, table(place), NOW)[1]
        # A renewal never lengthens the life of a token.
        authority.renew(tmp_path / "w", grace_seconds=30 * DAY)
        token = table(place).find(new.token.split("_")[2])
        assert token is not None
        assert token.expires_at == NOW + 3 * DAY


def test_an_expired_credential_can_be_renewed(place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        authority.issue("worker", "w", days=1, directory=tmp_path / "w")
        clock.now += 2 * DAY
        authority.renew(tmp_path / "w")
    assert load(tmp_path / "w", clock.now).expires_at == clock.now + DAY


def test_what_cannot_be_renewed(place: Path, clock: Clock, tmp_path: Path) -> None:
    with (
        Authority.init(place, clock=clock) as authority,
        Authority.init(tmp_path / "other", clock=clock) as other,
    ):
        authority.issue("worker", "w", directory=tmp_path / "w")
        other.issue("worker", "w", directory=tmp_path / "foreign")
        admin, worker = authority.issue("admin", "anna"), load(tmp_path / "w", NOW)
        assert "there is no directory" in refusal(lambda: authority.renew(tmp_path / "nowhere"))
        text = refusal(lambda: authority.renew(tmp_path / "foreign"))
        assert f"foreign: the token is of cluster {other.cluster} and this is cluster {authority.cluster}" in text
        # Role and name come from the token's entry; a certificate cannot change them.
        for mixed in (
            dataclasses.replace(worker, token=admin.token),
            dataclasses.replace(admin, token=worker.token),
        ):
            store.save(tmp_path / "mixed", mixed)
            text = refusal(lambda: authority.renew(tmp_path / "mixed"))
            assert text == f"cert.pem and token in {tmp_path}/mixed are of two credentials; copy all files of one"
        authority.revoke("w")
        text = refusal(lambda: authority.renew(tmp_path / "w"))
        assert "worker 'w' was revoked on" in text
        assert "certs issue worker --name w" in text
        assert len(authority.tokens()) == 2


def test_revoking_by_id_and_by_name(place: Path, clock: Clock) -> None:
    with Authority.init(place, clock=clock) as authority:
        made = [authority.issue("viewer", name) for name in ("anna", "anna", "bert", "bert")]
        ids = [credential.token.split("_")[2] for credential in made]
        clock.now += 60
        assert [token.id for token in authority.revoke(ids[0])] == ids[:1]
        assert [token.id for token in authority.revoke("bert")] == ids[2:]
        assert authority.revoke("bert") == []
        assert "no token has the name or id 'ana'; did you mean 'anna'?" in refusal(lambda: authority.revoke("ana"))
        assert "`gradstream certs ls` lists them" in refusal(lambda: authority.revoke("zzz"))
    reasons = [check(credential.token, table(place), clock.now)[1] for credential in made]
    assert ["was revoked on" in reason for reason in reasons] == [True, False, True, True]


def test_what_ended_is_forgotten_after_30_days(place: Path, clock: Clock) -> None:
    with Authority.init(place, clock=clock) as authority:
        authority.issue("viewer", "anna", days=1)
        clock.now += 31 * DAY - 1
        authority.issue("viewer", "bert")
        assert [token.name for token in authority.tokens()] == ["anna", "bert"]
        clock.now += 1
        authority.issue("viewer", "carl")
        assert [token.name for token in authority.tokens()] == ["bert", "carl"]


# ---- What must be there --------------------------------------------------------------------------------------------


def test_upkeep_is_decided_by_time_and_trust() -> None:
    def decide(days: float, trusts_cas: bool = True) -> tuple[str, str]:
        return upkeep(Token("0a1b2c3d", "0" * 64, "0" * 64, "worker", "w", NOW, NOW + int(days * DAY)), trusts_cas, NOW)

    assert decide(31) == ("kept", f"good until {utc(NOW + 31 * DAY)}")
    assert decide(30) == ("renewed", f"expires on {utc(NOW + 30 * DAY)}")
    assert decide(-1) == ("renewed", f"expired on {utc(NOW - DAY)}")
    assert decide(31, trusts_cas=False) == ("renewed", "the CA was rotated")


def test_what_is_there_stays_and_what_expires_soon_is_renewed(place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        assert authority.ensure("worker", "worker", tmp_path / "w") == ("issued", "there was none")
        before = files_of(tmp_path / "w")
        clock.now += 300 * DAY
        assert authority.ensure("worker", "worker", tmp_path / "w")[0] == "kept"
        assert files_of(tmp_path / "w") == before
        clock.now += 40 * DAY
        assert authority.ensure("worker", "worker", tmp_path / "w")[0] == "renewed"
    assert load(tmp_path / "w", clock.now).expires_at == clock.now + 365 * DAY


@pytest.mark.parametrize("name", store.FILES)
def test_a_damaged_credential_is_made_anew(name: str, place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        authority.ensure("worker", "worker", tmp_path / "w")
        for content in (b"x", None):
            if content is None:
                (tmp_path / "w" / name).unlink()
            else:
                (tmp_path / "w" / name).write_bytes(content)
            action, reason = authority.ensure("worker", "worker", tmp_path / "w")
            load(tmp_path / "w", NOW)
            # That it trusts the CAs of now is mended by a renewal, which keeps name and time.
            assert action == ("renewed" if (name, content) == ("ca.pem", b"x") else "issued"), reason


def test_half_replaced_files_are_made_anew(place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        authority.ensure("worker", "worker", tmp_path / "w")
        store.save(
            tmp_path / "w", dataclasses.replace(load(tmp_path / "w", NOW), key=authority.issue("worker", "x").key)
        )
        action, reason = authority.ensure("worker", "worker", tmp_path / "w")
        assert (action, "is not the key of cert.pem" in reason) == ("issued", True)
        load(tmp_path / "w", NOW)


def test_when_the_table_was_lost_credentials_are_made_anew(place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        authority.ensure("worker", "worker", tmp_path / "w")
    (place / "tokens.json").unlink()
    with Authority.init(place, clock=clock) as authority:
        action, reason = authority.ensure("worker", "worker", tmp_path / "w")
        assert (action, "is unknown to cluster" in reason) == ("issued", True)
    assert check(load(tmp_path / "w", NOW).token, table(place), NOW)[0] is not None


def test_what_was_revoked_stays_so(place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        authority.ensure("worker", "worker", tmp_path / "w")
        authority.revoke("worker")
        action, reason = authority.ensure("worker", "worker", tmp_path / "w")
        assert (action, "remove its files to have a new one" in reason) == ("kept", True)
        assert check(load(tmp_path / "w", NOW).token, table(place), NOW)[0] is None


def test_a_credential_of_another_role_or_cluster_is_left_alone(place: Path, clock: Clock, tmp_path: Path) -> None:
    with (
        Authority.init(place, clock=clock) as authority,
        Authority.init(tmp_path / "other", clock=clock) as other,
    ):
        authority.ensure("admin", "admin", tmp_path / "a")
        other.ensure("worker", "worker", tmp_path / "w")
        text = refusal(lambda: authority.ensure("worker", "worker", tmp_path / "a"))
        assert text == f"{tmp_path}/a holds a credential of role admin, not worker; choose another"
        text = refusal(lambda: authority.ensure("worker", "worker", tmp_path / "w"))
        assert f"of cluster {other.cluster}, and this is the authority of cluster {authority.cluster}; remove" in text
        assert load(tmp_path / "w", NOW).cluster == other.cluster


# ---- In TLS --------------------------------------------------------------------------------------------------------


def accepts(server: Credentials, client: Credentials, role: str | None = None) -> bool:
    """Whether a call of `client` to a service with `server`'s credentials, taken for `role`, is answered."""
    service = grpc.server(ThreadPoolExecutor(1))
    method = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    service.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Echo", {"Echo": method}),))
    pair = [(server.key, server.cert)]
    port = service.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair, server.ca, True))
    service.start()
    shown = grpc.ssl_channel_credentials(client.ca, client.key, client.cert)
    named = [("grpc.ssl_target_name_override", dns_name(role or server.role))]
    try:
        with grpc.secure_channel(f"127.0.0.1:{port}", shown, named) as channel:
            return bool(channel.unary_unary("/Echo/Echo")(b"hello", timeout=20) == b"hello")
    except grpc.RpcError as error:
        code = error.code()  # type: ignore[attr-defined]
    finally:
        service.stop(None)
    assert code is grpc.StatusCode.UNAVAILABLE
    return False


def test_peers_know_each_other_by_ca_and_role(tmp_path: Path) -> None:
    with Authority.init(tmp_path / "a") as authority, Authority.init(tmp_path / "b") as other:
        server, worker, admin = (authority.issue(role, "x") for role in ("server", "worker", "admin"))
        stranger = other.issue("worker", "x")
    assert accepts(server, worker)
    assert accepts(server, admin)
    assert accepts(worker, worker)
    assert not accepts(server, worker, "coordinator")
    assert not accepts(admin, worker), "a person's certificate is no server's"
    assert not accepts(server, stranger)
    assert not accepts(server, dataclasses.replace(stranger, ca=server.ca))
    assert not accepts(stranger, worker)


def test_a_rotation_of_the_ca_has_no_moment_in_which_peers_refuse_each_other(tmp_path: Path) -> None:
    """Who has been renewed, who has not yet, and a person with a pack from before: each accepts each."""
    names = [tmp_path / "server", tmp_path / "worker"]
    with Authority.init(tmp_path / "authority") as authority:
        old = [authority.issue(path.name, "x", directory=path) for path in names]
        person = authority.issue("viewer", "anna")
        authority.rotate_ca()
        assert len(authority.awaited()) == 3
        new = [authority.renew(path) for path in names]
        assert [load(path, time.time()).cert for path in names] == [each.cert for each in new]
        for server in (old[0], new[0]):
            for client in (old[1], new[1], person):
                assert accepts(server, client)
        text = refusal(authority.finish_ca_rotation)
        assert f"not renewed since the CA was rotated: viewer 'anna' ({person.token.split('_')[2]}); renew" in text
        authority.revoke("anna")
        authority.finish_ca_rotation()
        last = [authority.refresh_ca(path) for path in names]
        newcomer = authority.issue("worker", "y")
    assert all(each.ca.count(b"BEGIN") == 1 for each in (*last, newcomer))
    assert [load(path, time.time()).ca for path in names] == [each.ca for each in last]
    for server in (new[0], last[0]):
        assert accepts(server, new[1])
        assert accepts(server, last[1])
        assert accepts(server, newcomer)
    assert not accepts(last[0], old[1])
    assert not accepts(old[0], last[1])
    assert not (tmp_path / "authority" / "ca-cross.pem").exists()
    with Authority.open(tmp_path / "authority") as authority:
        assert authority.awaited() == []
        assert not authority.is_rotating


def test_steps_of_a_rotation_out_of_order(place: Path, clock: Clock) -> None:
    with Authority.init(place, clock=clock) as authority:
        assert "no rotation of the CA is under way" in refusal(authority.finish_ca_rotation)
        authority.rotate_ca()
        assert "--ca --finish" in refusal(authority.rotate_ca)
        # Nothing was issued before it, so nothing is waited for.
        authority.finish_ca_rotation()
        authority.rotate_ca()


def test_a_rotation_renews_what_init_looks_after(place: Path, clock: Clock, tmp_path: Path) -> None:
    with Authority.init(place, clock=clock) as authority:
        authority.ensure("worker", "worker", tmp_path / "w")
        authority.rotate_ca()
    with Authority.init(place, clock=clock) as authority:
        assert authority.ensure("worker", "worker", tmp_path / "w") == ("renewed", "the CA was rotated")
        assert authority.ensure("worker", "worker", tmp_path / "w")[0] == "kept"
        authority.finish_ca_rotation()


def test_a_rotation_that_was_cut_short_before_the_key_changed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both CAs are trusted and the old one still signs; the rotation can be ended, and begun again."""
    with Authority.init(place) as authority:
        before = authority.issue("worker", "w", directory=tmp_path / "w")
        real = os.replace

        def cut(source: Any, target: Any) -> None:
            if Path(target).name == "ca-key.pem":
                raise OSError(5, "Input/output error")
            real(source, target)

        monkeypatch.setattr(os, "replace", cut)
        assert "Input/output error" in refusal(authority.rotate_ca)
        monkeypatch.undo()
    with Authority.open(place) as authority:
        assert authority.is_rotating
        after = authority.renew(tmp_path / "w")
        assert accepts(after, before)
        assert accepts(before, after)
        authority.finish_ca_rotation()
        assert accepts(authority.issue("worker", "y"), before)
        authority.rotate_ca()


def test_a_renewal_that_was_cut_short_leaves_the_old_credential_good(
    place: Path, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Authority.init(place, clock=clock) as authority:
        old = authority.issue("worker", "w", directory=tmp_path / "w")

        def fail(*arguments: object) -> None:
            raise ConfigError("the disk is full")

        monkeypatch.setattr(authority_module.store, "save", fail)
        assert refusal(lambda: authority.renew(tmp_path / "w")) == "the disk is full"
    assert load(tmp_path / "w", NOW).token == old.token
    assert [check(old.token, table(place), NOW + 364 * DAY)[0] is not None, len(table(place).tokens)] == [True, 1]


def test_the_record_is_as_documented(place: Path) -> None:
    with Authority.init(place) as authority:
        record = read_record(place)
    assert record == Record(authority.cluster, "tokens.json")
    assert read_record(place.parent) is None
