"""The command line: help in time, only JSON on stdout, errors in one line with the right exit code."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from canned_jobs import CannedJobs, canned_job, canned_node
from support.pipelines import simulated_timelines, stage_costs, timeline_message

from gradstream.client import ServerMemory
from gradstream.coordinator.cli import main
from gradstream.coordinator.cli.app import COMMANDS, app
from gradstream.coordinator.cli.examples import EXAMPLES
from gradstream.coordinator.cli.options import parse_size
from gradstream.coordinator.cli.views import terminal
from gradstream.coordinator.cli.views.jobs import memory_text
from gradstream.core.errors import ConfigError
from gradstream.core.pipeline.schedule import make_schedule
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

ROOT = Path(__file__).parents[3]
GRADSTREAM = [sys.executable, "-m", "gradstream.coordinator.cli"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADSTREAM_COORDINATOR", "GRADSTREAM_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    best = 10.0
    for _ in range(3):
        # Of the processor: what else the machine does says nothing about the command.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*GRADSTREAM, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 0.3
    program = (
        "import sys; from gradstream.coordinator.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'grpc', 'rich', 'yaml', 'pydantic', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_help_names_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name, *_ in COMMANDS)
    assert "Exit codes" in text
    assert "130 Ctrl-C" in " ".join(text.split())


@pytest.mark.parametrize("name", [name for name, *_ in COMMANDS])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: gradstream {name}")


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name, *_ in COMMANDS if f"gradstream {name}" not in page] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"gradstream \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_unknown_command_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statsu"]) == 2
    assert "did you mean 'status'?" in capsys.readouterr().err


# ---- Recipes -------------------------------------------------------------------------------------------------------


def test_unknown_recipe_key_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "validate", "stdlib-gpt", "-s", "training.num_stesp=3", "-o", "json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "unknown key 'training.num_stesp'; did you mean 'num_steps'?" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes", "validate", "stdlib-gpt", "-s", "seed"], "not of the form key.sub=value"),
        (["recipes", "validate", "stdlib-gpt", "-s", "seed=x"], "'seed'"),
        (["recipes", "validate", "stdlib-gtp"], "did you mean 'stdlib-gpt'?"),
        (["recipes", "validate", "nothing/like/it.yaml"], "no such recipe"),
        (["dev", "stdlib-gpt", "--workers", "1"], "fewer than the recipe's cluster.min_workers 2"),
        (["dev", "stdlib-gpt", "-s", "trainin.x=1"], "did you mean 'training'?"),
        (["submit", "stdlib-gpt", "-s", "x.y=1"], "unknown key 'x'"),
        (["serve", "worker", "--memory", "4XB"], "is not a size"),
        (["serve", "worker", "--name", "a b"], "a name has"),
        (["serve", "parameter-server", "--processes", "2", "--name", "a" * 62], "a name has"),
        (["serve", "parameter-server", "--processes", "3", "--listen", "[::1]:65534"], "need ports up to 65536"),
        (["serve", "coordinator", "--listen", "7000"], "host:port"),
        (["serve", "coordinator", "--listen", "0.0.0.0:7000"], "use --insecure on a network where you trust"),
        (["serve", "worker", "--listen", "[::]:0"], "is open to other machines, and there are no credentials"),
        (["serve", "worker", "--cache", "/dev/null/x"], "--cache /dev/null/x cannot be written"),
        (["serve", "worker", "--insecure", "--credentials", "."], "contradict each other"),
        (["serve", "coordinator", "--state", "/dev/null/x"], "cannot be made"),
        (["generate", "./nowhere"], "no such directory"),
        (["ls", "-c", "nonsense"], "host:port"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_generate_names_what_a_directory_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls", "-o", "json"]) == 0
    assert "stdlib-gpt" in [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert main(["recipes", "show", "stdlib-gpt"]) == 0
    assert capsys.readouterr().out == (ROOT / "recipes" / "stdlib-gpt.yaml").read_text(encoding="utf-8")
    assert main(["recipes", "show", "stdlib-gpt", "-s", "seed=7", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 7
    assert main(["recipes", "validate", "stdlib-gpt"]) == 0
    assert "stdlib-gpt is valid" in capsys.readouterr().out


# ---- Jobs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["status"],
        ["status", "tiny-1"],
        ["pause"],
        ["pause", "tiny-1"],
        ["resume", "tiny-1"],
        ["stop", "tiny-1", "--now"],
        ["ckpt", "ls"],
        ["top", "--count", "1"],
        ["submit", "stdlib-gpt"],
        ["doctor"],
    ],
)
def test_json_is_one_document(arguments: list[str], address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "-c", address, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_pipe_gets_whole_values_without_padding(
    jobs: CannedJobs, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However wide the terminal is said to be."""
    monkeypatch.setenv("COLUMNS", "40")
    reason = "r" * 300
    jobs.jobs = [canned_job(reason=reason, decisions=["d" * 300])]
    jobs.nodes = [canned_node("a-node-with-a-long-name", device="cuda" * 30)]
    for command in (["ls"], ["status"], ["top", "--count", "1"], ["metrics"], ["ckpt", "ls"]):
        assert main([*command, "-c", address]) == 0
        text = capsys.readouterr().out
        assert [line for line in text.splitlines() if line != line.rstrip()] == []
        assert "…" not in text
        if command in (["ls"], ["status"]):
            assert reason in text


def test_what_ends_a_job_takes_no_default_and_says_so(
    jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", "-c", address]) == 2
    assert capsys.readouterr().err == (
        "error: `gradstream stop` ends a job, so name it; for the newest: gradstream stop tiny-1\n"
    )
    assert main(["pause", "-c", address]) == 0
    assert capsys.readouterr().out == "tiny-1 running: steps are committed\n"
    assert jobs.requests[-1].job_id == "tiny-1"


def test_a_wait_on_a_steps_normal_way_is_not_shown(
    jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The canned job takes 1.4 s a step: what a node waits for is shown after 4.3 s."""
    for seconds, shown in ((1, False), (30, True)):
        node = canned_node()
        node.activity.waiting_since_unix_ms = int(1000 * (time.time() - seconds))
        jobs.jobs, jobs.nodes = [canned_job(waits=[])], [node]
        assert main(["status", "-c", address]) == 0
        text = capsys.readouterr().out
        assert ("worker-0 waits for version 13 from server-0 since" in text) == shown
        assert ("nothing" in text) != shown


def test_watch_shows_progress_until_the_end(jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.jobs = [canned_job(state=jobs_pb2.JOB_STATE_FINISHED, version=100)]
    assert main(["watch", "-c", address]) == 0
    captured = capsys.readouterr()
    assert captured.out == "tiny-1\n"
    assert "tiny-1 finished  step 100/100  loss 4.250" in captured.err
    jobs.jobs = [canned_job(state=jobs_pb2.JOB_STATE_FAILED, reason="no data")]
    assert main(["watch", "tiny-1", "-c", address, "-o", "json"]) == 8
    assert json.loads(capsys.readouterr().out)["state"] == "failed"


def log_item(cursor: int, node: str, level: str, text: str) -> jobs_pb2.WatchJobResponse:
    line = coordinator_pb2.LogLine(unix_ms=1_700_000_000_000, level=level, text=text)
    return jobs_pb2.WatchJobResponse(cursor=cursor, log=jobs_pb2.NodeLogLine(node=node, line=line))


def test_logs_of_a_node_a_level_and_the_last(
    jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = ("debug", "info", "warning", "error", "critical")
    jobs.history = [
        log_item(number, f"worker-{number % 2}", level, f"line-{number}") for number, level in enumerate(levels, 1)
    ]

    def lines(*options: str) -> list[str]:
        assert main(["logs", "-c", address, "-o", "json", *options]) == 0
        return [json.loads(line)["text"].removeprefix("line-") for line in capsys.readouterr().out.splitlines()]

    assert lines() == ["1", "2", "3", "4", "5"]
    assert lines("--level", "warning") == ["3", "4", "5"]
    assert lines("--node", "worker-1") == ["1", "3", "5"]
    assert lines("--node", "worker-1", "--node", "worker-0", "--tail", "2") == ["4", "5"]
    assert lines("--tail", "1", "--level", "error", "--node", "worker-0") == ["4"]
    assert main(["logs", "-c", address, "--node", "worker-7"]) == 0
    assert "lines came from worker-0, worker-1" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "kinds"), [("logs", ["log"]), ("events", ["event"])])
def test_streams_are_one_object_a_line(
    command: str, kinds: list[str], address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "tiny-1", "-c", address, "-o", "json"]) == 0
    assert [json.loads(line)["type"] for line in capsys.readouterr().out.splitlines()] == kinds


def test_events_name_written_checkpoints_too(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "tiny-1", "-c", address]) == 0
    assert "checkpoint written version 1, 4.0 KiB" in capsys.readouterr().out


def test_status_names_waits_decisions_and_holders(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "-c", address]) == 0
    text = capsys.readouterr().out
    for part in (
        "tiny-1",
        "12 of 100 (12 %)",
        "a worker for slots 1, 3, from worker-1, since 2023-11-14",
        "worker-0 waits for version 13 from server-0 since",
        "slot 1: nobody",
        "placement: balanced [2 servers]",
        "1.2 k tokens/s, up 3.0 MiB/s, down 2.0 MiB/s, ETA 2 min 05 s",
        "4.5000 nats a token (at the start 8.0000)",
        "communication hidden by compute: 63 %",
        "4 stages on 4 workers, schedule 1f1b, bubble 21 % (ideal 20 %)",
        "server-0: holds 36.0 MiB for 2.0 M parameters, 18.87 B each (predicted 19.00); "
        "contributions that wait: 1.0 MiB of at most 8.0 MiB",
    ):
        assert part in text, part


def test_whole_bundles_for_new_workers_are_not_taken_for_state() -> None:
    memory = ServerMemory("server-0", 1 << 20, 25 << 20, 21 << 20, 0, 4 << 20, 4 << 20, 4 << 20)
    assert memory_text(memory) == (
        "server-0: holds 21.0 MiB for 1.0 M parameters, 21.00 B each (predicted 21.00); "
        "whole bundles for new workers: 4.0 MiB of at most 4.0 MiB; contributions that wait: 0 B of at most 4.0 MiB"
    )


def test_status_of_an_empty_cluster(jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.jobs, jobs.nodes = [], []
    assert main(["status", "-c", address]) == 0
    captured = capsys.readouterr()
    assert "no nodes have registered" in captured.out
    assert "no jobs yet" in captured.err
    assert main(["ls", "-c", address, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_dead_nodes_stand_out(jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.nodes = [canned_node(), canned_node("worker-1", alive=False)]
    assert main(["status", "-c", address]) == 0
    assert "no, last heard 2023-11-14" in capsys.readouterr().out


def test_logs_show_brackets_as_they_are(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "-c", address]) == 0
    text = capsys.readouterr().out
    assert "worker-0" in text
    assert "warning slow [link]" in text


EVIL = "\x1b[2J\x1b]0;mine\x07\x9b31m\u202efdp.exe\r"
SEEN = r"\x1b[2J\x1b]0;mine\x07\x9b31m\u202efdp.exe\x0d"


@pytest.mark.parametrize(
    "command", [("ls",), ("status",), ("logs",), ("events",), ("stop", "nope"), ("stop", "tiny-1")]
)
def test_escape_sequences_of_others_are_shown_and_not_carried_out(
    jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    """In reasons, names, waits, events, log lines and errors; a terminal that shows them stays as it is."""
    jobs.jobs = [canned_job(state=jobs_pb2.JOB_STATE_FAILED, reason=EVIL, decisions=[EVIL])]
    jobs.nodes = [canned_node(EVIL, activity=coordinator_pb2.Activity(job_id="tiny-1", waiting_for=EVIL))]
    jobs.warnings = [EVIL]
    for item in jobs.history:
        if item.HasField("event"):
            item.event.message = EVIL
        if item.HasField("log"):
            item.log.node = item.log.line.text = EVIL
    main([*command, "-c", address])
    captured = capsys.readouterr()
    everything = captured.out + captured.err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", everything), everything
    if command[-1] != "nope":
        assert SEEN[:8] in everything
    main([*command, "-c", address, "-o", "json"])
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", capsys.readouterr().out)


def test_nothing_of_others_is_printed_as_it_is() -> None:
    """What is printed without `views.terminal` is constant, a recipe, or said to be shown."""
    found = []
    for path in sorted(Path(terminal.__file__).parents[1].rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"):
                continue
            constant = all(isinstance(argument, ast.Constant) for argument in node.args)
            line = ast.get_source_segment(source, node) or ""
            if not constant and "shown(" not in line and path.name not in ("terminal.py", "recipes.py"):
                found.append(f"{path.name}: {line}")
    assert found == ['app.py: print(f"gradstream {__version__}")']


def test_status_says_what_needs_a_hand(jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.warnings = ["the credentials of server 's' expire soon; renew it: `gradstream certs rotate DIR`"]
    assert main(["status", "-c", address]) == 0
    assert f"warning: {jobs.warnings[0]}\n" in capsys.readouterr().err
    assert main(["status", "-c", address, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == jobs.warnings


def test_address_from_the_environment(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADSTREAM_COORDINATOR", address)
    assert main(["ls"]) == 0
    assert "tiny-1" in capsys.readouterr().out


def test_unknown_job(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", "nope", "-c", address, "-o", "json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: no job 'nope'; `gradstream ls` lists them\n"


def test_submit_watch_fails_with_the_jobs_reason(
    jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.jobs = [canned_job("tiny-2", state=jobs_pb2.JOB_STATE_FAILED, reason="no data")]
    assert main(["submit", "stdlib-gpt", "--watch", "-c", address, "-o", "json"]) == 8
    captured = capsys.readouterr()
    assert json.loads(captured.out)["state"] == "failed"
    assert captured.err.splitlines()[-1] == "error: job tiny-2 failed at step 12 of 100: no data"


def test_export(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "export", "--to", str(tmp_path / "x"), "-c", address, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["model.safetensors"] == 6
    assert main(["ckpt", "export", "tiny-1", str(tmp_path / "x"), "-c", address]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["ckpt", "export", "tiny-1", "-c", address]) == 2
    assert capsys.readouterr().err == "error: name the directory to write with --to DIR\n"


def commands(
    command: typer.core.TyperGroup | typer.core.TyperCommand, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Every command of the tree, by its words."""
    if not hasattr(command, "list_commands"):
        yield " ".join(words), command
        return
    context = typer.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from commands(found, (*words, name))


def test_examples_of_help_are_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    tree = dict(commands(typer.main.get_command(app)))
    for words, lines in EXAMPLES.items():
        options = {spelling for parameter in tree[words].params for spelling in parameter.opts}
        for line in lines:
            assert line.startswith(f"gradstream {words}")
            assert {word for word in shlex.split(line) if word.startswith("-")} <= options, line
        assert main([*words.split(), "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(f"  {line}\n" in shown for line in lines)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["submit", "stdlib-gpt", "--lr", "1e-3"], "optimizer.learning_rate"),
        (["dev", "stdlib-gpt", "--batch-size", "8"], "training.global_batch"),
        (["submit", "stdlib-gpt", "--num-steps", "8"], "training.num_steps"),
        (["finetune", "create", "stdlib-finetune", "--lora_r", "8"], "lora.rank"),
        (["submit", "stdlib-gpt", "--nothing-like-it", "8"], None),
        (["ls", "--lr", "1e-3"], None),
    ],
)
def test_an_option_that_is_a_recipes_key_leads_to_set(
    arguments: list[str], key: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert ("-s" in told) == (key is not None)
    assert key is None or told == f"Keys of a recipe are overridden with -s: -s {key}=VALUE"


def test_the_whole_tree_has_one_way_to_say_a_thing() -> None:
    """Where output goes is `--to`, a recipe's overrides are `--set`, a job or a fine-tuning that is left out is the
    newest, except where something ends."""
    other_places = {"--out", "--output-dir", "--out-dir", "--directory", "--dir", "--dest", "--save", "--target"}
    writers, unnamed = set(), set()
    tree = dict(commands(typer.main.get_command(app)))
    for words, command in tree.items():
        options = {spelling for parameter in command.params for spelling in parameter.opts}
        assert not options & other_places, words
        assert not options & {"--override", "--overrides"}, words
        writers |= {words} if "--to" in options else set()
        for parameter in command.params:
            shown = (getattr(parameter, "metavar", None) or "").strip("[]")
            if parameter.param_type_name == "argument" and shown in ("JOB", "NAME", "SOURCE"):
                assert not parameter.required, words
                if "must be named" in (parameter.help or ""):
                    unnamed.add(words)
            if parameter.param_type_name == "argument" and shown == "RECIPE":
                assert "--set" in options, words
    assert {"ckpt export", "finetune export", "data prepare", "init", "certs issue", "trace"} <= writers
    assert unnamed >= {"stop", "finetune cancel"}


def test_older_spellings_of_options_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "book.txt"
    text.write_text("One line of a book.\n" * 50)
    for spelling in ("--out", "--to"):
        path = tmp_path / f"set{spelling}"
        assert main(["data", "prepare", str(text), spelling, str(path), "--vocab-size", "300"]) == 0
        assert (path / "manifest.json").exists()
    assert main(["data", "prepare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--to DIR" in shown
    assert "--out " not in shown


def test_trace(
    jobs: CannedJobs,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "-c", address]) == 0
    assert capsys.readouterr().out == (
        "tiny-1-trace.json: 2 versions of tiny-1 by 2 workers; open it in https://ui.perfetto.dev or chrome://tracing\n"
    )
    names = [event["name"] for event in json.loads(Path("tiny-1-trace.json").read_text())["traceEvents"]]
    assert (names.count("send 0"), names.count("compute slot 1"), names.count("version 8")) == (3, 3, 2)
    assert main(["trace", "tiny-1", "-c", address, "--to", "other.json"]) == 0
    assert Path("other.json").read_text() == Path("tiny-1-trace.json").read_text()
    capsys.readouterr()
    # What cannot be done is said in one line, and leaves nothing behind.
    Path("directory").mkdir()
    jobs_before = jobs.timelines
    for arguments, code, message in [
        (["trace", "nope"], 2, "no job 'nope'"),
        (["trace", "--to", "nowhere/x.json"], 2, "nowhere/x.json cannot be written (No such file or directory)"),
        (["trace", "--to", "directory"], 2, "directory cannot be written (Is a directory)"),
        (["trace", "tiny-1"], 3, "no timeline of job tiny-1 yet"),
    ]:
        jobs.timelines = [] if code == 3 else jobs_before
        assert main([*arguments, "-c", address]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "other.json", "tiny-1-trace.json"]


def test_status_of_a_job_without_pipeline_and_of_one_not_yet_measured(
    jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.jobs = [canned_job(pipeline=None)]
    assert main(["status", "tiny-1", "-c", address]) == 0
    assert "pipeline" not in capsys.readouterr().out
    jobs.jobs = [canned_job(pipeline=jobs_pb2.Pipeline(num_stages=1, num_workers=1, schedule="gpipe"))]
    assert main(["status", "tiny-1", "-c", address]) == 0
    assert "1 stage on 1 worker, schedule gpipe\n" in re.sub(" +\n", "\n", capsys.readouterr().out)


def test_gantt(
    jobs: CannedJobs,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = make_schedule("1f1b", 4, 12)
    found = [
        timeline_message(timeline)
        for version in (7, 8)
        for timeline in simulated_timelines(schedule, stage_costs(schedule, latency_us=50), version=version)
    ]
    # Of version 8 one timeline has not come yet.
    jobs.timelines = found[:-1]
    assert main(["trace", "-c", address, "--gantt", "tiny.png"]) == 0
    assert capsys.readouterr().out == "tiny.png: version 7 of tiny-1 by 4 workers, bubble 21 % (ideal 20 %)\n"
    assert Path("tiny.png").read_bytes().startswith(b"\x89PNG")
    assert not Path("tiny-1-trace.json").exists()
    jobs.timelines = found
    assert main(["trace", "-c", address, "--gantt", "tiny.png", "--to", "tiny.json"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["tiny.png", "tiny.json"]
    assert "1F11" in [event["name"] for event in json.loads(Path("tiny.json").read_text())["traceEvents"]]
    # What cannot be done is said in one line, and leaves nothing behind.
    for timelines, job, path, code, message in [
        (found, canned_job(), "nowhere/x.png", 2, "nowhere/x.png cannot be written (No such file or directory)"),
        (found, canned_job(pipeline=None), "x.png", 2, "job tiny-1 has no pipeline to draw; leave out --gantt"),
        (found[:3], canned_job(), "x.png", 3, "job tiny-1 has no version yet for which the passes of all stages"),
    ]:
        jobs.timelines, jobs.jobs = timelines, [job]
        assert main(["trace", "-c", address, "--gantt", path]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny.png"]


def test_unreachable_coordinator(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    started = time.monotonic()
    assert main(["ls", "-c", address, "-o", "json"]) == 7
    assert time.monotonic() - started < 6
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: coordinator {address} does not answer")
    assert captured.err.count("\n") == 1
    assert main(["doctor", "-c", address]) == 1
    assert "fail coordinator" in capsys.readouterr().out


def test_unexpected_error_is_one_line_and_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("boom\nboom")

    options = importlib.import_module("gradstream.coordinator.cli.recipes")
    monkeypatch.setattr(options, "bundled_recipes", broken)
    assert main(["recipes", "ls"]) == 1
    assert capsys.readouterr().err == (
        "error: RuntimeError: boom boom\nrun with GRADSTREAM_DEBUG=1 for the stack trace\n"
    )
    monkeypatch.setenv("GRADSTREAM_DEBUG", "1")
    assert main(["recipes", "ls"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupting_logs_detaches(jobs: CannedJobs, address: str) -> None:
    # The job goes on, so the watch does: it asks again and again from its cursor until the interrupt.
    del jobs
    command = [*GRADSTREAM, "logs", "-f", "tiny-1", "-c", address]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts tests in the background has their children ignore the interrupt.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout is not None
            assert "slow [link]" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "detached; tiny-1 goes on" in errors


def test_interrupt_is_130(address: str) -> None:
    command = [*GRADSTREAM, "logs", "tiny-1", "-c", address]
    program = "import gradstream.client as c; from gradstream.coordinator.cli import main; import sys\n"
    program += "def interrupted(*a, **k): raise KeyboardInterrupt\n"
    program += f"c.Client.job = interrupted\nsys.exit(main({command[3:]!r}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "")


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


PRINTING = [
    ["--help"],
    ["--version"],
    ["recipes", "ls"],
    ["recipes", "show", "stdlib-gpt"],
    ["recipes", "show", "stdlib-gpt", "-o", "json"],
    ["recipes", "validate", "stdlib-gpt"],
    ["finetune", "--help"],
    ["submit", "--help"],
    ["ls"],
    ["ls", "-o", "json"],
    ["status"],
    ["status", "tiny-1"],
    ["status", "tiny-1", "-o", "json"],
    ["logs", "tiny-1"],
    ["events", "tiny-1"],
    ["events", "tiny-1", "-o", "json"],
    ["metrics"],
    ["metrics", "-o", "csv"],
    ["metrics", "-o", "json"],
    ["ckpt", "ls"],
    ["top", "--count", "1"],
    ["top", "--count", "1", "-o", "json"],
    ["pause", "tiny-1"],
    ["submit", "stdlib-gpt"],
    ["doctor"],
    ["doctor", "-o", "json"],
]


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_that_goes_away_is_141(
    arguments: list[str],
    jobs: CannedJobs,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever prints: a table of rich's, JSON, help, a stream."""
    monkeypatch.setenv("GRADSTREAM_COORDINATOR", address)
    with os.fdopen(closed_pipe(), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(arguments) == 141
        monkeypatch.undo()
    written = capsys.readouterr().err
    assert "Traceback" not in written
    assert "error" not in written


def test_a_process_whose_reader_went_away_ends_with_141_and_no_word(address: str) -> None:
    """Tables are written at once, and others when the interpreter ends; a reader of errors may leave too."""
    for arguments in (["status", "-c", address], ["recipes", "show", "stdlib-gpt"], ["--help"]):
        write_end = closed_pipe()
        result = subprocess.run([*GRADSTREAM, *arguments], stdout=write_end, stderr=subprocess.PIPE, text=True)
        os.close(write_end)
        assert (result.returncode, result.stderr) == (141, "")
    write_end = closed_pipe()
    result = subprocess.run([*GRADSTREAM, "recipes", "show", "none"], stdout=write_end, stderr=write_end)
    os.close(write_end)
    assert result.returncode == 141


# ---- Numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        ("1.5 MiB", 3 << 19),
        ("500MB", 500_000_000),
        ("2k", 2000),
        ("1T", 10**12),
        ("7Ki", 7 << 10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4XB", "4 Gi B", "1e3", "0", "i", "4i"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_numbers_for_people() -> None:
    assert [terminal.format_bytes(n) for n in (0, 1023, 1536, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]
    assert [terminal.format_count(n) for n in (0, 999, 1500, 2e6)] == ["0", "999", "1.5 k", "2.0 M"]
    assert [terminal.format_duration(n) for n in (None, 5, 65, 7500, 200_000)] == [
        "-",
        "5 s",
        "1 min 05 s",
        "2 h 05 min",
        "2 d 07 h",
    ]
