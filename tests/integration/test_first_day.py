"""The first day of a new user, through the command line: docs/first-day.md is run, and says what is printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import unified_diff

import pytest
from support.first_day import PAGE, at_work, walk
from support.person import Person, masked, refreshed, sessions

pytestmark = pytest.mark.timeout(300)

# What these print depends on times, on how many steps there were time for (`init` measures the machine and decides how
# often a checkpoint is written, so `rm` has one or more of them to remove), or on the bits of this machine.
VARYING = ("status", "watch", "ls", "events", "metrics", "generate", "rm", "finetune create", "finetune status")
VARYING_COMMANDS = re.compile(rf"gradstream ({'|'.join(VARYING)}|finetune compare)\b(?!.*--dry-run)|python ")


@pytest.fixture(scope="module")
def person() -> Iterator[Person]:
    """A person at the end of her first day."""
    with at_work() as (person, cluster):
        walk(person, cluster)
        yield person


def said(person: Person, command: str, number: int = 0) -> str:
    """What a command printed the first time, or another time, without quantities and ends of lines."""
    return masked([text for each, text in person.transcript if each == f"gradstream {command}"][number])


def test_the_page_says_what_is_printed(person: Person) -> None:
    page = PAGE.read_text(encoding="utf-8")
    fixed = [each for each in sessions(page) if not VARYING_COMMANDS.match(each[0])]
    now = [each for each in sessions(refreshed(page, person.transcript)) if not VARYING_COMMANDS.match(each[0])]
    assert [masked(command) for command, _ in fixed] == [masked(command) for command, _ in now]
    assert len(fixed) > 15
    differences = [
        line
        for before, after in zip(fixed, now, strict=True)
        if masked(before[1]) != masked(after[1])
        for line in unified_diff(before[1].splitlines(), after[1].splitlines(), before[0], "printed now", lineterm="")
    ]
    assert not differences, "write the page again with docs/write_first_day.py:\n" + "\n".join(differences)


def test_status_says_where_a_step_goes(person: Person) -> None:
    text = said(person, "status")
    assert text.startswith("NODE KIND ALIVE PHASE STEP RESIDENT WAITS FOR server-# parameter-server yes")
    assert "state running: epoch # from version # step # of # (# %), epoch #, skipped #" in text
    assert "training loss # nats a token validation loss # nats a token (at the start #)" in text
    assert re.search(r"a step takes #: compute # %, .*% (\w+ sets|most of a step|the others wait)", text)
    assert "decisions servers: all # that were live (server-#, server-#), led by server-#" in text
    assert text.endswith("waits for nothing follow it: gradstream watch tales-# its log: gradstream logs -f tales-#")


def test_a_pause_is_seen_in_the_list(person: Person) -> None:
    assert "tales-# paused #/# # # - - paused at version # more about one: gradstream status tales-#" in said(
        person, "ls"
    )


def test_watch_follows_to_the_end(person: Person) -> None:
    for number in (0, 1):
        text = said(person, "watch", number)
        assert text.startswith("tales-# finished ▁ step #/# loss # validation # a step takes #: compute # %")
        assert text.endswith("tales-# export it: gradstream ckpt export tales-# --to DIR")
    events = said(person, "events --tail 12")
    assert re.search(r"# checkpoint written version #, # # checkpoint removed version #: the newest # are kept", events)
    # Old checkpoints are removed in the background: the last removal comes before or after the end.
    removed = " # checkpoint removed version #: the newest # are kept"
    assert events.removesuffix(removed).endswith("# state finished: all # steps are done")


def test_more_steps_are_done(person: Person) -> None:
    text = said(person, "status", 1)
    assert "server-# parameter-server no, last" in text
    assert "state finished: all # steps are done step # of # (# %), submitted with #, epoch #, skipped #" in text
    assert "waits for" not in text.partition("job tales-#")[2]


def test_metrics_and_text_come_out(person: Person) -> None:
    metrics = said(person, "metrics --every 10")
    assert metrics.startswith("tales-# finished, # tokens in # steps loss # ▁ # STEP TOKENS LOSS VALIDATION")
    assert metrics.endswith(
        "draw it: gradstream plot tales-# all rows: gradstream metrics tales-# -o csv > metrics.csv"
    )
    text = said(person, 'generate model --prompt "The old" --max-new-tokens 60')
    assert text.startswith("The old")
    assert (person.directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (person.directory / "model" / "model.safetensors").exists()


def test_the_fine_tuning_learns(person: Person) -> None:
    created = said(person, "finetune create habits.yaml --wait")
    assert "habits training: as job habits-#" in created
    assert "habits finished, job habits-# finished: version # is the best look: gradstream finetune compare" in created
    status = said(person, "finetune status")
    assert "base job:tales-#@# (sha#" in status
    assert "after validation loss # nats a token, perplexity #, # of # different held-out prompts" in status
    compared = next(text for command, text in person.transcript if command == "gradstream finetune compare -n 2")
    (base,), (result,) = (re.findall(rf"^{name} +\S+ +\S+ +(\d+) of", compared, re.M) for name in ("base", "habits"))
    assert int(result) > int(base)
    assert (person.directory / "adapter" / "adapter_model.safetensors").exists()


def test_the_script_goes_on_from_the_first_job(person: Person) -> None:
    (printed,) = [text for command, text in person.transcript if command == "python further.py"]
    first, *rows = printed.splitlines()
    assert masked(first) == "tales-# finished: validation loss #"
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    trained, untrained = re.findall(
        r"validation loss +(\S+) nats a token \(at the start (\S+)\)", last(person, "status")
    )[0]
    assert float(rows[0].split()[2]) < (float(trained) + float(untrained)) / 2
    assert re.fullmatch(r"tales-# removed: # checkpoints?, #", said(person, "rm tales-2"))
    names = [line.split()[0] for line in last(person, "ls").splitlines()]
    assert names == ["JOB", "habits-1", "tales-1", "more"]


def last(person: Person, command: str) -> str:
    """What a command printed the last time."""
    return [text for each, text in person.transcript if each == f"gradstream {command}"][-1]
