"""A real cluster with credentials: the same bits as without TLS, changing credentials, one line for refused callers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.cluster import Cluster, running, wait_until
from support.credentials import make_credentials
from support.tiny import tiny_recipe

from gradstream.client import Client
from gradstream.coordinator.cli.local.processes import COMMAND
from gradstream.core.credentials.authority import Authority
from gradstream.core.credentials.tokens import ROLES, TokenTable
from gradstream.core.errors import GradstreamError
from gradstream.core.rpc.transport import LOOK_SECONDS

ACCESS = 9
NUM_STEPS = 24
GRACE_SECONDS = 3 * LOOK_SECONDS
"""Long enough for all callers to look at their credentials, short enough to be over before the job is."""
DAY_SECONDS = 86_400


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A coordinator, a server and two workers, each with credentials of its role."""
    with running(tmp_path_factory.mktemp("secure"), secure=True) as cluster:
        cluster.start_coordinator()
        cluster.start_servers("server-0")
        cluster.start_workers("worker-0", "worker-1")
        yield cluster


def gradstream(cluster: Cluster, credentials: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRADSTREAM_")}
    environment |= {"GRADSTREAM_COORDINATOR": cluster.address, "COLUMNS": "300"}
    # Nothing that `gradstream login` has stored on this machine.
    environment["XDG_CONFIG_HOME"] = str(cluster.directory / "config")
    if credentials is not None:
        environment["GRADSTREAM_CREDENTIALS"] = str(credentials)
    command = [*COMMAND, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def refused(cluster: Cluster, credentials: Path | None, *arguments: str) -> str:
    """Run a command that must be refused with one line; return the line."""
    result = gradstream(cluster, credentials, *arguments)
    assert (result.returncode, result.stdout) == (ACCESS, ""), result
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def of_role(cluster: Cluster, role: str) -> Path:
    assert cluster.credentials is not None
    return cluster.credentials / role


def copied(cluster: Cluster, role: str, to: Path) -> Path:
    return Path(shutil.copytree(of_role(cluster, role), to))


def authority_of(cluster: Cluster, clock: Callable[[], float] = time.time) -> Authority:
    assert cluster.credentials is not None
    return Authority.open(cluster.credentials / "authority", clock)


@pytest.mark.timeout(600)
def test_the_bits_are_those_without_credentials_also_while_all_of_them_are_replaced(
    secure: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    training = {"num_steps": NUM_STEPS}
    with running(tmp_path / "clear") as clear:
        clear.start_coordinator()
        clear.start_servers("server-0")
        clear.start_workers("worker-0")
        job = clear.client.submit(tiny_recipe(tiny_data, tmp_path / "clear-runs", training=training))
        clear.finish(job.job_id)
        digest = clear.final_digest(job.job_id)
    # Two stages: workers stream to each other.
    pipeline = {"stages": 2, "schedule": "1f1b"}
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", training=training, pipeline=pipeline, cluster={"min_workers": 2})
    job = secure.client.submit(recipe)
    secure.wait_for(job.job_id, lambda found: found.version >= 2, "train")
    assert secure.credentials is not None
    before = {role: (of_role(secure, role) / "cert.pem").read_bytes() for role in ROLES}
    with authority_of(secure) as authority:
        authority.rotate_ca()
        for role in ROLES:
            authority.renew(of_role(secure, role), grace_seconds=GRACE_SECONDS)
        authority.finish_ca_rotation()
    assert all((of_role(secure, role) / "cert.pem").read_bytes() != before[role] for role in ROLES)
    # Who comes now meets the new certificates alone; who was there goes on.
    secure.kill("worker-1")
    secure.start_workers("worker-1")
    secure.finish(job.job_id, 300)
    assert secure.final_digest(job.job_id) == digest


def test_people_are_told_what_their_credentials_are_not_good_for(secure: Cluster, tmp_path: Path) -> None:
    assert gradstream(secure, of_role(secure, "viewer"), "ls").returncode == 0
    for role, command, words in (
        ("viewer", ("stop", "tiny-1"), "StopJob is for submitters and above, and these credentials are of a viewer"),
        ("worker", ("events", "tiny-1"), "GetJob is for viewers and above, and these credentials are of a worker"),
        ("server", ("submit", "stdlib-gpt"), "SubmitJob is for submitters and above"),
    ):
        assert words in refused(secure, of_role(secure, role), *command)


def test_without_credentials_one_is_told_to_log_in(secure: Cluster) -> None:
    line = refused(secure, None, "ls")
    assert "gradstream login" in line


def test_credentials_of_another_cluster(secure: Cluster, tmp_path: Path) -> None:
    make_credentials(tmp_path / "other", ["admin"])
    line = refused(secure, tmp_path / "other" / "admin", "ls")
    assert "another" in line or "CA" in line
    mixed = copied(secure, "admin", tmp_path / "mixed")
    (mixed / "token").write_bytes((tmp_path / "other" / "admin" / "token").read_bytes())
    assert "copy all files of one credential" in refused(secure, mixed, "ls")


def test_expired_and_revoked(secure: Cluster, tmp_path: Path) -> None:
    # A certificate of which the time is over.
    with authority_of(secure, lambda: time.time() - 100 * DAY_SECONDS) as authority:
        authority.issue("submitter", "late", 1, tmp_path / "late")
    assert "expired on" in refused(secure, tmp_path / "late", "ls")
    # A token of which the time is over while the certificate is good.
    with authority_of(secure) as authority:
        made = authority.issue("submitter", "brief", 30, tmp_path / "brief")
        table = TokenTable.parse(authority.tokens_path.read_bytes())
    assert gradstream(secure, tmp_path / "brief", "ls").returncode == 0
    token_id = made.token.split("_")[2]
    ended = tuple(
        dataclasses.replace(token, expires_at=int(time.time()) - 60) if token.id == token_id else token
        for token in table.tokens
    )
    (of_role(secure, "coordinator") / "tokens.json").write_bytes(dataclasses.replace(table, tokens=ended).serialize())
    client = Client(secure.address, credentials=tmp_path / "brief")
    wait_until(lambda: answers(client) != "", "the coordinator to see the table", 20)
    client.close()
    assert "of submitter 'brief' expired on" in refused(secure, tmp_path / "brief", "ls")
    # A token that was taken back.
    with authority_of(secure) as authority:
        authority.issue("submitter", "fired", 30, tmp_path / "fired")
    client = Client(secure.address, credentials=tmp_path / "fired")
    wait_until(lambda: answers(client) == "", "the coordinator to see the table", 20)
    with authority_of(secure) as authority:
        authority.revoke("fired")
    wait_until(lambda: answers(client) != "", "the coordinator to see the table", 20)
    client.close()
    assert "of submitter 'fired' was revoked on" in refused(secure, tmp_path / "fired", "ls")


def answers(client: Client) -> str:
    """Empty when the coordinator answers, else its refusal."""
    try:
        client.jobs()
    except GradstreamError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("role", "credentials", "words"),
    [
        ("parameter-server", "worker", "credentials of a worker cannot be used by a parameter server"),
        ("worker", "server", "credentials of a server cannot be used by a worker"),
        ("worker", "submitter", "Register is for workers and servers, and these credentials are of a submitter"),
        ("worker", None, "wants TLS, and no credentials were given for it; store them with `gradstream login`"),
    ],
)
def test_a_node_cannot_be_what_its_credentials_are_not_of(
    secure: Cluster, role: str, credentials: str | None, words: str
) -> None:
    directory = of_role(secure, credentials) if credentials is not None else None
    result = gradstream(secure, directory, "serve", role, "--coordinator", secure.address, "--memory", "1GiB")
    assert result.returncode == ACCESS, result
    assert "Traceback" not in result.stderr
    assert words in result.stderr.splitlines()[-1]
    assert role not in [node.name for node in secure.client.nodes()]


def test_a_node_of_another_cluster_is_told_which_ca_it_meets(secure: Cluster, tmp_path: Path) -> None:
    make_credentials(tmp_path / "other", ["worker"])
    command = ("serve", "worker", "--coordinator", secure.address, "--memory", "1GiB")
    result = gradstream(secure, tmp_path / "other" / "worker", *command)
    assert result.returncode == ACCESS, result
    assert "Traceback" not in result.stderr
    assert "CA" in result.stderr.splitlines()[-1], result


def test_a_worker_with_an_expired_certificate_says_so(secure: Cluster, tmp_path: Path) -> None:
    with authority_of(secure, lambda: time.time() - 400 * DAY_SECONDS) as authority:
        authority.issue("worker", "old", 1, tmp_path / "old")
    result = gradstream(secure, tmp_path / "old", "serve", "worker", "--coordinator", secure.address)
    assert result.returncode == ACCESS
    assert "expired on" in result.stderr.splitlines()[-1]


def test_who_did_what_is_kept(secure: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", training={"num_steps": 2})
    job = secure.client.submit(recipe)
    secure.client.stop(job.job_id, now=True)
    refused(secure, of_role(secure, "viewer"), "stop", job.job_id)
    lines = (secure.directory / "state" / "audit.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    about = [event for event in events if event["subject"] == job.job_id]
    assert [(event["call"], event["caller"], event["outcome"]) for event in about] == [
        ("StopJob", "admin (admin)", "ok"),
    ]
    # The request of a call that is refused is not read, so the job that it was about is not known.
    refusal = next(event for event in events if event["caller"] == "viewer (viewer)" and event["call"] == "StopJob")
    assert refusal["outcome"].startswith("refused: StopJob is for submitters")
    assert [event["call"] for event in events if event["caller"] == "admin (admin)"].count("SubmitJob") >= 1
    history = list(secure.client.watch(job.job_id, follow=False))
    assert any("submitted by admin (admin)" in str(item) for item in history)


def test_a_coordinator_without_its_table_does_not_start(secure: Cluster, tmp_path: Path) -> None:
    directory = copied(secure, "coordinator", tmp_path / "coordinator")
    (directory / "tokens.json").unlink()
    result = gradstream(
        secure, directory, "serve", "coordinator", "--listen", "127.0.0.1:0", "--state", str(tmp_path / "s")
    )
    assert result.returncode == ACCESS
    assert "the table of tokens" in result.stderr.splitlines()[-1]
