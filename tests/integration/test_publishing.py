"""Credentials over several machines, with the commands of docs/cluster.md.

The authority is on one machine. A coordinator with a copy of its credentials is on another. Credentials that are issued
and revoked later take effect when they are published.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import Cluster, running, wait_until

from gradstream.client import Client
from gradstream.coordinator.cli.local.processes import COMMAND
from gradstream.core.credentials.authority import Authority
from gradstream.core.credentials.store import from_pack, save
from gradstream.core.errors import GradstreamError

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
ADDRESS = "10.0.0.1:7000"


def commands(section: str) -> list[str]:
    """The `gradstream certs` commands of the blocks after a line of the page, in order, comments left out."""
    text = PAGE.read_text().split(section, 1)[1].split("\n- ", 1)[0].replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in text.splitlines() if line.startswith("gradstream certs")]
    assert len(lines) == 7
    return lines


class Machine:
    """The one with the authority: a directory, in which commands run as a person would run them."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("GRADSTREAM_")}
        self.environment["XDG_CONFIG_HOME"] = str(directory / "config")

    def run(self, command: str, returncode: int = 0) -> subprocess.CompletedProcess[str]:
        shell = re.sub(r"\bgradstream (?=certs|login)", f"{shlex.join(COMMAND)} ", command)
        done = subprocess.run(
            ["bash", "-c", shell],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == returncode, done
        return done


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("there"), secure=True) as made:
        yield made


def refusal(cluster: Cluster, credentials: Path) -> str:
    """Empty when the coordinator lets these credentials in, else why not."""
    with Client(cluster.address, credentials=credentials) as client:
        try:
            client.jobs()
        except GradstreamError as error:
            return str(error)
    return ""


@pytest.mark.timeout(300)
def test_the_commands_of_the_readme(cluster: Cluster, tmp_path: Path) -> None:
    here = Machine(tmp_path / "here")
    init, publish, login, issue, publish_issued, revoke, publish_revoked = commands("On several machines")
    assert "takes effect once it is published" in here.run(init).stderr
    here.run(publish)
    # Each role's directory is copied away: nothing that is changed here reaches the copies by itself.
    assert cluster.credentials is not None
    shutil.rmtree(cluster.credentials / "coordinator")
    shutil.copytree(here.directory / "creds" / "coordinator", cluster.credentials / "coordinator")
    cluster.start_coordinator()

    def there(command: str) -> str:
        return command.replace(ADDRESS, cluster.address)

    here.run(there(login))
    # 1. Issued, and good once it is published.
    said = here.run(there(issue)).stderr
    assert "takes effect once it is published: gradstream certs publish HOST:PORT" in said
    ann = tmp_path / "ann"
    save(ann, from_pack((here.directory / "ann.json").read_text(), time.time()))
    assert "is unknown to cluster" in refusal(cluster, ann)
    assert "is in force at the coordinator" in here.run(there(publish_issued)).stderr
    assert refusal(cluster, ann) == ""
    # 2. Revoked, and refused once that is published.
    old = Path(shutil.copytree(here.directory / "authority", here.directory / "old"))
    said = here.run(there(revoke)).stderr
    assert "takes effect once it is published" in said
    assert refusal(cluster, ann) == ""
    here.run(there(publish_revoked))
    wait_until(lambda: "was revoked on" in refusal(cluster, ann), "the coordinator to refuse ann", 20)
    # 3. An older table is refused, and so is one that the authority did not make, whoever brings it.
    stale = here.run(f"gradstream certs publish {cluster.address} --authority {old}", 2).stderr
    assert "was the authority restored from an older copy?" in stale
    with Authority.init(tmp_path / "forged") as forger, Authority.open(here.directory / "authority") as right:
        table, _, _ = right.signed()
        _, signature, certificate = forger.signed()
    admin = here.directory / "creds" / "admin"
    with (
        Client(cluster.address, credentials=admin) as client,
        pytest.raises(GradstreamError, match="is not of this cluster's authority"),
    ):
        client.publish_tokens(table, signature, certificate)
