"""The audit log's records of refused calls, and the number of its files."""

from __future__ import annotations

import json
from pathlib import Path

from gradstream.core.rpc.audit import AuditLog
from gradstream.core.rpc.refusals import MANY, AuditEvent, Refusals


def event(
    second: float, caller: str = "ann (viewer)", call: str = "StopJob", outcome: str = "refused: no"
) -> AuditEvent:
    return AuditEvent(int(second * 1000), call, caller, "ipv4:10.0.0.9", "", outcome)


def test_the_first_of_a_kind_is_told_at_once_and_the_others_once_a_minute() -> None:
    refusals = Refusals()
    assert refusals.add(event(0), "AccessError") == [event(0)]
    for second in range(1, 50):
        assert refusals.add(event(second), "AccessError") == []
    assert refusals.add(event(2, call="PauseJob"), "AccessError") == [event(2, call="PauseJob")]
    assert refusals.due(59) == []
    (gathered,) = refusals.due(60)
    assert (gathered.unix_ms, gathered.times) == (49_000, 49)
    assert refusals.due(100) == []
    # The next one is a first one again.
    assert refusals.add(event(101), "AccessError") == [event(101)]
    assert refusals.rest() == []


def test_those_of_many_callers_are_gathered_as_one() -> None:
    refusals = Refusals(max_kinds=2)
    for number in range(100):
        refusals.add(event(number / 100, caller=f"w{number} (worker)"), "CredentialsError")
    (gathered,) = refusals.rest()
    assert (gathered.caller, gathered.times) == (MANY, 97)


def test_several_old_files_are_kept(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, max_bytes=1, num_old_files=3)
    for second in range(6):
        log.note(event(second))
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == ["audit.1.jsonl", "audit.2.jsonl", "audit.3.jsonl", "audit.jsonl"]
    seconds = [json.loads(path.read_text())["unix_ms"] // 1000 for path in kept]
    assert seconds == [4, 3, 2, 5]
