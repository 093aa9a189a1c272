"""`gradstream finetune` against a service with canned answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from canned_fine_tunings import CannedFineTunings, canned_fine_tuning, canned_report, serving_fine_tunings
from canned_jobs import SUBMITTED_MS, canned_job
from rich.text import Text

from gradstream.client import ExamplesReport, FineTuning, Job, RenderedExample, RenderedPiece
from gradstream.coordinator.cli import main
from gradstream.coordinator.cli.views.fine_tunings import (
    TARGET_STYLE,
    example_text,
    held_out,
    preview_warnings,
    print_comparisons,
)
from gradstream.coordinator.cli.views.progress import progress_facts
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.proto.v1 import jobs_pb2


@pytest.fixture
def service() -> CannedFineTunings:
    """What the service answers; tests change it."""
    return CannedFineTunings()


@pytest.fixture(autouse=True)
def _address(service: CannedFineTunings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with serving_fine_tunings(service) as address:
        monkeypatch.setenv("GRADSTREAM_FINE_TUNING", address)
        yield


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose file of examples is there."""
    (tmp_path / "task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    path = tmp_path / "recipe.yaml"
    tree = {"name": "made", "base_model": "/models/tiny", "data": {"path": str(tmp_path / "task.jsonl")}}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["status"],
        ["status", "task"],
        ["pause", "task"],
        ["resume", "task"],
        ["cancel", "task"],
        ["compare", "task"],
        ["compare", "task", "-p", "def", "-p", "class"],
        ["generate", "task", "-p", "def"],
    ],
)
def test_json_is_one_document(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", *arguments, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_create(service: CannedFineTunings, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "create", str(recipe), "-s", "lora.rank=4"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "made training, job made-1 finished: as job made-1\n"
    assert "made training: as job made-1" in captured.err
    assert json.loads(service.requests[0].recipe_json)["lora"]["rank"] == 4


def test_create_of_what_fails(service: CannedFineTunings, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service.created = canned_fine_tuning("made", state=pb.FINE_TUNING_STATE_FAILED, reason="no row can be used")
    assert main(["finetune", "create", str(recipe)]) == 8
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == "error: made failed: no row can be used"
    assert main(["finetune", "create", str(recipe), "-s", "data.path=/not/there"]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_create_sends_files(service: CannedFineTunings, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "create", str(recipe), "--upload", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "made"
    assert service.uploaded == b'{"prompt": "a", "completion": "b"}\n'
    assert json.loads(service.requests[0].recipe_json)["data"]["path"] == "/state/uploads/task.jsonl"


def test_dry_run_marks_targets(service: CannedFineTunings, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "create", str(recipe), "--dry-run", "-n", "1"]) == 0
    text = capsys.readouterr().out
    assert "task.jsonl:1: 12 tokens, 5 of them targets" in text
    # As they are, brackets too; there are no colours here.
    assert "def add(a, [b]):⟦return a + b⟧" in text
    assert (
        "10 rows of prompt-completion: 6 to train on, 2 held out, 1 bad, 1 too long; 1.2 k target tokens in 3 rows"
    ) in text
    assert "bad: task.jsonl:4: the completion is empty" in text
    assert [type(request).__name__ for request in service.requests] == ["PreviewExamplesRequest"]


def test_targets_are_coloured_on_a_terminal() -> None:
    pieces = (RenderedPiece("def", False), RenderedPiece(" pass", True))
    text = example_text(RenderedExample("task.jsonl:1", pieces, 3, 2), colours=True)
    assert isinstance(text, Text)
    assert text.plain == "def pass"
    assert [(span.start, span.end, span.style) for span in text.spans] == [(3, 8, TARGET_STYLE)]


def test_status_says_how_good_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "status"]) == 0
    text = capsys.readouterr().out
    for part in (
        "finished: version 12 is the best",
        "tiny-llama (sha256 abababababababab)",
        "lora, 36.9 k parameters trained",
        "validation loss 3.2500 nats a token, perplexity 2.500, 0 of 2 different held-out prompts completed exactly",
        "validation loss 0.5000 nats a token, perplexity 2.500, 1 of 2 different held-out prompts completed exactly",
        "288.0 KiB a step over all workers",
    ):
        assert part in text, part


def test_status_before_the_first_validation_pass_of_a_version(
    service: CannedFineTunings, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base's loss is not shown as that of what was learnt, though steps are done."""
    job = canned_job("task-1", version=7, initial_validation_loss=3.25, validation_loss=3.25)
    running = {"state": pb.FINE_TUNING_STATE_TRAINING, "before": None, "after": None, "job": job}
    service.fine_tunings = [canned_fine_tuning(best_version=None, **running)]
    assert main(["finetune", "status"]) == 0
    before, after = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("before", "after")))
    assert "validation loss 3.2500 nats a token" in before
    assert "not evaluated yet" in after
    job.validation_loss = 2.5
    service.fine_tunings = [canned_fine_tuning(best_version=6, **running)]
    assert main(["finetune", "status"]) == 0
    assert "validation loss 2.5000 nats a token" in capsys.readouterr().out


def test_a_paused_fine_tuning_says_why_and_how_to_go_on(
    service: CannedFineTunings, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "paused at version 31"
    wait = jobs_pb2.Wait(what="`gradstream resume task-1`", whom="a person", since_unix_ms=SUBMITTED_MS)
    job = canned_job("task-1", state=jobs_pb2.JOB_STATE_PAUSED, reason=reason, waits=[wait])
    service.fine_tunings = [canned_fine_tuning(state=pb.FINE_TUNING_STATE_TRAINING, reason="as job task-1", job=job)]
    for command in ("ls", "status"):
        assert main(["finetune", command]) == 0
        text = capsys.readouterr().out
        assert "paused at version 31; go on with: gradstream finetune resume task" in text
        assert "gradstream resume task-1" not in text
    assert main(["finetune", "pause"]) == 0
    assert capsys.readouterr().out == "task training, job task-1 paused: as job task-1; paused at version 31\n"


def test_what_ends_a_fine_tuning_takes_no_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "cancel"]) == 2
    assert capsys.readouterr().err == (
        "error: `gradstream finetune cancel` ends a fine-tuning, so name it; for the newest: "
        "gradstream finetune cancel task\n"
    )
    assert main(["finetune", "generate", "--prompt", "def"]) == 0
    assert capsys.readouterr().out == "return a + b\n"


def test_a_dry_run_warns_of_few_examples_and_of_none_held_out(
    service: CannedFineTunings, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = canned_report()
    report.num_train, report.num_validation = 2, 0
    service.preview = pb.PreviewExamplesResponse(report=report)
    assert main(["finetune", "create", str(recipe), "--dry-run"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.partition(",")[0].partition(":")[2].split()[:2] for line in warnings] == [
        ["2", "examples"],
        ["no", "example"],
    ]
    report.num_train, report.num_validation = 18, 2
    assert preview_warnings(ExamplesReport.from_proto(report)) == []


def test_ls(service: CannedFineTunings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "ls"]) == 0
    assert "tiny-llama" in capsys.readouterr().out
    service.fine_tunings = []
    assert main(["finetune", "ls"]) == 0
    assert "no fine-tunings yet" in capsys.readouterr().err


def test_ls_says_what_the_service_generates(service: CannedFineTunings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "ls"]) == 0
    assert "generating" not in capsys.readouterr().err
    service.generation.num_running, service.generation.cache_bytes = 3, 5 << 20
    assert main(["finetune", "ls"]) == 0
    line = "generating: 3 running, 0 waiting; keys and values reserve 5.0 MiB of 1.0 GiB"
    assert line in capsys.readouterr().err.splitlines()
    service.generation.num_waiting, service.generation.reason = 2, "no memory"
    assert main(["finetune", "ls"]) == 0
    assert "3 running, 2 waiting (no memory); keys" in capsys.readouterr().err


def test_watch(service: CannedFineTunings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "watch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "task training"
    assert "validation loss 4.0000 at version 1" in lines
    assert lines[-1] == "task finished: version 12 is the best"
    assert main(["finetune", "watch", "task", "-o", "json"]) == 0
    kinds = [json.loads(line)["type"] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["fine-tuning", "event", "step", "validation", "log", "checkpoint", "fine-tuning"]
    # The same state and reason again, as after each new best version, are no new line.
    service.break_watch_after = [2]
    assert main(["finetune", "watch", "task"]) == 0
    assert capsys.readouterr().out.splitlines().count("task training") == 1
    service.fine_tunings = [canned_fine_tuning(state=pb.FINE_TUNING_STATE_FAILED, reason="no memory")]
    assert main(["finetune", "watch"]) == 8
    assert "error: task failed: no memory" in capsys.readouterr().err


def test_generate(service: CannedFineTunings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "generate", "task", "--prompt", "def", "--stop", "x", "--temperature", "0.5"]) == 0
    assert capsys.readouterr().out == "return a + b\n"
    assert list(service.requests[0].stop) == ["x"]
    assert main(["finetune", "generate", "task", "--prompt", "hello", "--base", "--chat", "-o", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["text"], said["num_tokens"], said["finish_reason"]) == ("x x", 2, "end-of-text")
    assert service.requests[1].messages[0].content == "hello"
    assert main(["finetune", "generate", "task", "--prompt", "too long"]) == 2
    assert "64 positions" in capsys.readouterr().err


def test_a_conversation_has_a_system(service: CannedFineTunings, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["finetune", "generate", "task", "--prompt", "hello", "--system", "be brief"]
    assert main([*asked, "--chat"]) == 0
    told = [(message.role, message.content) for message in service.requests[0].messages]
    assert told == [("system", "be brief"), ("user", "hello")]
    assert main(["finetune", "compare", "task", "-p", "hello", "--chat", "--system", "be brief"]) == 0
    assert [message.content for message in service.requests[-1].messages] == ["be brief", "hello"]
    capsys.readouterr()
    assert main(asked) == 2
    assert "--system is a message of a conversation; give --chat too" in capsys.readouterr().err


def test_what_is_not_asked_for_is_not_sent(service: CannedFineTunings) -> None:
    assert main(["finetune", "generate", "task", "--prompt", "x"]) == 0
    assert not service.requests[0].HasField("max_new_tokens")
    assert main(["finetune", "generate", "task", "--prompt", "x", "--top-p", "0", "--max-new-tokens", "3"]) == 0
    assert (service.requests[1].top_p, service.requests[1].max_new_tokens) == (0.0, 3)
    assert service.requests[1].HasField("top_p")


def test_the_hint_of_a_chat_says_chat(
    service: CannedFineTunings, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = canned_report()
    report.format = "chat"
    hints: list[str] = []
    monkeypatch.setattr("gradstream.coordinator.cli.views.terminal.hint", lambda *lines: hints.extend(lines))
    for examples, flag in ((report, " --chat"), (canned_report(), "")):
        service.created = canned_fine_tuning("made", examples=examples)
        assert main(["finetune", "create", str(recipe), "--wait"]) == 0
        assert [hint.split("--prompt TEXT")[1] for hint in hints if "finetune generate made" in hint] == [flag]
        hints.clear()


def test_rates_say_which_tokens_they_count(service: CannedFineTunings, capsys: pytest.CaptureFixture[str]) -> None:
    report = canned_report()
    report.num_tokens = 2 * report.num_target_tokens
    job = canned_job("task-1", tokens_per_second=1200.0, recipe_json=json.dumps({"fine_tuning": {"method": "lora"}}))
    running = {"state": pb.FINE_TUNING_STATE_TRAINING, "before": None, "after": None, "job": job}
    service.fine_tunings = [canned_fine_tuning(examples=report, **running)]
    assert main(["finetune", "status"]) == 0
    assert "1.2 k target tokens/s (2.4 k tokens/s in all)" in capsys.readouterr().out
    assert any("1.2 k target tokens/s" in fact for fact in progress_facts(Job.from_proto(job)))
    assert any(
        "1.2 k tokens/s" in fact for fact in progress_facts(Job.from_proto(canned_job("x", tokens_per_second=1200.0)))
    )


def test_fields_that_are_not_used_are_named(
    service: CannedFineTunings, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = canned_report()
    report.unused_fields.update({"id": 10, "source": 3})
    report.notes.append("3 examples are the same as another one")
    preview = pb.PreviewExamplesResponse(report=report)
    service.preview = preview
    assert main(["finetune", "create", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "fields not used: id (10 rows), source (3 rows)" in shown
    assert "note: 3 examples are the same as another one" in shown
    service.fine_tunings = [canned_fine_tuning(examples=report)]
    assert main(["finetune", "status", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"]["unused_fields"] == {"id": 10, "source": 3}


def test_compare(service: CannedFineTunings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "compare", "task"]) == 0
    text = capsys.readouterr().out
    for part in ("def add(a, [b]):", "expected  return a + b", "base      x x x", "task      return a + b", "0.5000"):
        assert part in text, part
    assert main(["finetune", "compare", "task", "-p", "def", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparisons"] == [
        {"prompt": "def", "expected": None, "base": "x x", "result": "return a + b"}
    ]
    service.fine_tunings = [canned_fine_tuning(after=None, state=pb.FINE_TUNING_STATE_TRAINING)]
    assert main(["finetune", "compare", "task"]) == 2
    assert "has no result yet; wait for its end, or compare with --prompt" in capsys.readouterr().err
    service.fine_tunings = [canned_fine_tuning(after=None, state=pb.FINE_TUNING_STATE_CANCELLED)]
    assert main(["finetune", "compare", "task"]) == 2
    assert "has no result yet; go on with it: gradstream finetune resume, or compare" in capsys.readouterr().err


def test_a_result_without_held_out_prompts_is_one(
    service: CannedFineTunings, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of text, or with validation.num_exact_match 0."""
    found = canned_fine_tuning()
    found.before.ClearField("samples")
    found.after.ClearField("samples")
    service.fine_tunings = [found]
    made = FineTuning.from_proto(found)
    print_comparisons(made, held_out(made))  # what `finetune dev` ends with
    assert "0.5000" in capsys.readouterr().out
    assert main(["finetune", "compare", "task"]) == 2
    assert "task has no held-out prompts; compare with --prompt" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--seed", 2**64), ("--max-new-tokens", 2**32)])
def test_numbers_that_no_message_can_hold(option: str, value: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "generate", "task", "-p", "x", option, str(value)]) == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err


def test_export(tmp_path: Path, service: CannedFineTunings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "export", "task", "--to", str(tmp_path / "out"), "--merged", "-o", "json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files == {"README.md": 4, "adapter_model.safetensors": 6}
    assert service.requests[0].kind == pb.EXPORT_KIND_MERGED
    assert main(["finetune", "export", "task", "--to", str(tmp_path / "other"), "--version", "3"]) == 4
    assert "no checkpoint of version 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "create", "nothing/like/it.yaml"], "no such recipe"),
        (["finetune", "status", "other"], "no fine-tuning 'other'"),
        (["finetune", "ls", "--service", "nonsense"], "host:port, like 127.0.0.1:7001"),
        (["serve", "fine-tuning", "--listen", "7001"], "host:port"),
        (["dev", "stdlib-gpt", "--fine-tuning"], "add --keep"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
