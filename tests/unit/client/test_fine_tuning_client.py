"""The fine-tuning client against a real gRPC server with canned answers."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from canned_fine_tunings import CannedFineTunings, serving_fine_tunings

from gradstream.client import (
    AsyncFineTuningClient,
    CheckpointError,
    ConfigError,
    DataError,
    FineTuning,
    FineTuningClient,
    FineTuningFailedError,
    FineTuningState,
    GeneratedText,
    Generation,
    RenderedPiece,
    UnreachableError,
    Validation,
)
from gradstream.proto.v1 import fine_tuning_pb2 as pb

RECIPE = {"name": "made", "base_model": "base", "data": {"path": "task.jsonl"}}


@pytest.fixture
def service() -> CannedFineTunings:
    """What the service answers; tests change it."""
    return CannedFineTunings()


@pytest.fixture
def client(service: CannedFineTunings) -> Iterator[FineTuningClient]:
    """A client of a service that answers with `service`."""
    with serving_fine_tunings(service) as address, FineTuningClient(address) as client:
        yield client


def test_sync_and_async_have_the_same_methods() -> None:
    def names(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    assert names(FineTuningClient) - {"address"} == names(AsyncFineTuningClient)


def test_a_fine_tuning_is_typed(client: FineTuningClient) -> None:
    found = client.get("task")
    assert found.state is FineTuningState.FINISHED
    assert found.state.ended
    assert found.base == "tiny-llama"
    assert found.job is not None
    assert found.job.job_id == "task-1"
    assert found.before is not None
    assert found.after is not None
    assert (found.before.loss, found.after.loss) == (3.25, 0.5)
    assert (found.after.num_exact, found.after.num_prompts) == (1, 2)
    assert found.after.samples[0].generated == "return a + b"
    assert found.examples is not None
    assert found.examples.bad_rows == ("task.jsonl:4: the completion is empty",)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["state"] == "finished"
    assert document["after"]["num_exact"] == 1


def test_what_is_not_there_is_none(service: CannedFineTunings, client: FineTuningClient) -> None:
    service.fine_tunings = [pb.FineTuning(name="task", state=pb.FINE_TUNING_STATE_PREPARING)]
    found = client.get()
    assert (found.job, found.examples, found.before, found.after, found.best_version) == (None,) * 5
    assert not found.state.ended


def test_paths_of_a_recipe_are_made_absolute(
    service: CannedFineTunings, client: FineTuningClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = client.create(RECIPE)
    assert made.state is FineTuningState.PREPARING
    sent = json.loads(service.requests[0].recipe_json)
    assert (sent["base_model"], sent["data"]["path"]) == (str(tmp_path / "base"), str(tmp_path / "task.jsonl"))
    with pytest.raises(ConfigError, match="overrides go with the path of a recipe"):
        client.create(RECIPE, ["seed=1"])
    with pytest.raises(ConfigError, match="unknown key 'dat'; did you mean 'data'"):
        client.create({**RECIPE, "dat": 1})


def test_errors_keep_their_class(client: FineTuningClient, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--upload"):
        client.create({**RECIPE, "data": {"path": "/not/there"}})
    with pytest.raises(ConfigError, match="no fine-tuning 'other'"):
        client.get("other")
    with pytest.raises(ConfigError, match="64 positions"):
        list(client.generate("task", "too long"))
    with pytest.raises(CheckpointError, match="no checkpoint of version 3"):
        client.export("task", tmp_path / "out", version=3)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_sent_in_pieces(service: CannedFineTunings, client: FineTuningClient, tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "task.jsonl").write_bytes(content)
    assert client.upload(tmp_path / "task.jsonl") == "/state/uploads/task.jsonl"
    assert service.uploaded == content
    with pytest.raises(ConfigError, match="cannot be read"):
        client.upload(tmp_path / "other")
    for several in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(ConfigError, match="and one file is sent; join its files into one"):
            client.upload(several)


def test_a_recipe_is_created_with_its_files_sent(
    service: CannedFineTunings, client: FineTuningClient, tmp_path: Path
) -> None:
    files = {key: tmp_path / f"{key}.jsonl" for key in ("path", "validation_path")}
    files["path"].write_bytes(b"training ")
    recipe = {"name": "task", "base_model": "/models/tiny", "data": {key: str(path) for key, path in files.items()}}
    # Both are looked at before one is sent.
    with pytest.raises(ConfigError, match=r"validation_path\.jsonl cannot be read"):
        client.create(recipe, upload=True)
    assert service.uploaded == b""
    files["validation_path"].write_bytes(b"validation")
    client.create(recipe, upload=True)
    assert service.uploaded == b"training validation"
    sent = json.loads(service.requests[-1].recipe_json)["data"]
    assert {key: sent[key] for key in files} == {key: f"/state/uploads/{path.name}" for key, path in files.items()}
    client.preview(recipe, upload=True)
    assert json.loads(service.requests[-1].recipe_json)["data"]["path"] == "/state/uploads/path.jsonl"


def test_preview(service: CannedFineTunings, client: FineTuningClient) -> None:
    preview = client.preview(RECIPE, num_examples=7)
    assert service.requests[0].num_examples == 7
    assert preview.examples[0].pieces[1] == RenderedPiece("return a + b", True)
    assert preview.report.num_rows == 10


def test_generation_is_streamed(service: CannedFineTunings, client: FineTuningClient) -> None:
    pieces = list(client.generate("task", "def", max_new_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop=["\n"]))
    assert pieces == [GeneratedText("return", 1, ""), GeneratedText(" a + b", 2, "end-of-text")]
    asked = service.requests[0]
    assert (asked.name, asked.use_base, asked.prompt, asked.max_new_tokens) == ("task", False, "def", 9)
    assert (asked.temperature, asked.top_p, asked.seed, list(asked.stop)) == (0.5, 0.9, 3, ["\n"])
    assert "".join(piece.text for piece in client.generate("task", "def", base=True)) == "x x"
    list(client.generate(None, [{"role": "user", "content": "hello"}], base="/models/tiny"))
    asked = service.requests[-1]
    assert (asked.name, asked.base, asked.use_base, asked.prompt) == ("", "/models/tiny", False, "")
    assert [(message.role, message.content) for message in asked.messages] == [("user", "hello")]


def test_a_generation_may_be_left_early(client: FineTuningClient) -> None:
    pieces = client.generate("task", "def")
    assert next(pieces).text == "return"
    pieces.close()
    assert client.get("task").name == "task"


def test_a_watch_survives_a_break(service: CannedFineTunings, client: FineTuningClient) -> None:
    service.break_watch_after = [3]
    items = list(client.watch("task"))
    states = [item.state.value for item in items if isinstance(item, FineTuning)]
    assert states == ["training", "training", "finished"]
    # Items of the history come once.
    assert [item.cursor for item in items if not isinstance(item, FineTuning)] == [1, 2, 3, 5, 6]
    assert [item.loss for item in items if isinstance(item, Validation)] == [4.0]


def test_wait(service: CannedFineTunings, client: FineTuningClient) -> None:
    seen: list[str] = []
    assert client.wait("task", lambda now: seen.append(now.state)).name == "task"
    assert seen == ["finished"]
    client.create(RECIPE)
    assert client.wait("made", until=lambda now: now.state == "training").state == "training"
    service.created.state = pb.FINE_TUNING_STATE_FAILED
    service.created.reason = "no memory"
    with pytest.raises(FineTuningFailedError, match="made failed: no memory") as caught:
        client.wait("made")
    assert caught.value.exit_code == 8


def test_export(client: FineTuningClient, service: CannedFineTunings, tmp_path: Path) -> None:
    assert client.export("task", tmp_path / "adapter") == tmp_path / "adapter"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == b"abcdef"
    client.export("task", tmp_path / "merged", kind="merged", version=12)
    assert [request.kind for request in service.requests] == [pb.EXPORT_KIND_UNSPECIFIED, pb.EXPORT_KIND_MERGED]
    with pytest.raises(ConfigError, match="is not empty"):
        client.export("task", tmp_path / "merged")


def test_what_the_service_generates(service: CannedFineTunings, client: FineTuningClient) -> None:
    service.generation = pb.GetGenerationResponse(
        num_running=3, num_waiting=2, cache_bytes=5, max_cache_bytes=7, reason="no memory"
    )
    assert client.generation() == Generation(3, 2, 5, 7, "no memory")


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("GRADSTREAM_FINE_TUNING", address)
    with FineTuningClient(connect_timeout_seconds=2) as client, pytest.raises(UnreachableError) as caught:
        client.list()
    assert f"fine-tuning service {address} does not answer" in str(caught.value)
    assert "gradstream serve fine-tuning" in str(caught.value)
    assert "GRADSTREAM_FINE_TUNING, --service" in str(caught.value)
