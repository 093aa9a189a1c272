"""Faults are placed at (step, slot), and a typing error in them is refused."""

import os
import signal

import pytest

from gradstream.core.errors import ConfigError
from gradstream.core.node.faults import VARIABLE, Fault, Faults, parse_faults


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(process, signal) of every kill, none of which happens."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda process, number: found.append((process, number)))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" ; ", []),
        ("kill@step=3,slot=1", [Fault("kill", 3, 1)]),
        ("kill@step=3,slot=1,acknowledged=5", [Fault("kill", 3, 1, 5)]),
        ("nan@step=4", [Fault("nan", 4)]),
        (" nan@step=4,slot=0 ; kill@step=9 ;", [Fault("nan", 4, 0), Fault("kill", 9)]),
    ],
)
def test_faults_are_parsed(text: str, expected: list[Fault]) -> None:
    assert parse_faults(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "kill",
        "kill@",
        "kill@slot=1",
        "kill@step=x",
        "kill@step",
        "kill@step=1,slot=1,when=2",
        "explode@step=1",
        "kill@step=1;nan",
        "kill@step=1,kind=3",
    ],
)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"{VARIABLE}: '.*' is not a fault"):
        parse_faults(text)


def test_a_fault_without_a_slot_matches_every_slot() -> None:
    assert Fault("nan", 4).matches(4, 7)
    assert not Fault("nan", 4).matches(5, 7)
    assert Fault("nan", 4, 0).matches(4, 0)
    assert not Fault("nan", 4, 0).matches(4, 1)


def test_kill_before_a_slot(kills: list[tuple[int, int]]) -> None:
    faults = Faults("kill@step=3,slot=1")
    faults.before_slot(3, 0)
    faults.before_slot(2, 1)
    faults.acknowledged(3, 1)
    assert kills == []
    faults.before_slot(3, 1)
    assert kills == [(os.getpid(), signal.SIGKILL)]


def test_kill_at_the_given_acknowledgement(kills: list[tuple[int, int]]) -> None:
    faults = Faults("kill@step=3,slot=1,acknowledged=2")
    faults.before_slot(3, 1)
    faults.acknowledged(3, 1)
    faults.acknowledged(3, 0)
    assert kills == []
    faults.acknowledged(3, 1)
    assert kills == [(os.getpid(), signal.SIGKILL)]


def test_kill_of_a_server_once_a_step_is_decided(kills: list[tuple[int, int]]) -> None:
    faults = Faults("kill@step=3,decided=1")
    faults.before_slot(3, 0)
    faults.acknowledged(3, 0)
    faults.sent(3, 0)
    faults.decided(2)
    assert kills == []
    faults.decided(3)
    assert kills == [(os.getpid(), signal.SIGKILL)]


def test_nan_spoils_its_slot_alone() -> None:
    faults = Faults("nan@step=4,slot=1")
    assert [faults.spoils(4, slot) for slot in range(3)] == [False, True, False]
    assert not faults.spoils(3, 1)


def test_the_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nan@step=0")
    assert Faults().spoils(0, 0)
    monkeypatch.delenv(VARIABLE)
    assert not Faults().spoils(0, 0)
