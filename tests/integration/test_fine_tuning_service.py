"""The fine-tuning service on a real cluster: from a recipe to an adapter, with the service killed in the middle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.cluster import Cluster, running, wait_until
from support.fine_tuning import write_base

from gradstream.client import (
    CheckpointError,
    ConfigError,
    DataError,
    FineTuning,
    FineTuningClient,
    FineTuningFailedError,
    Step,
    Validation,
)
from gradstream.coordinator.cli import main

pytestmark = pytest.mark.timeout(240)

NUM_STEPS = 60
INTERVAL = 15
POSITIONS = 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained model."""
    return write_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions: four different completions, so that a little training tells."""
    path = tmp_path_factory.mktemp("examples") / "sums.jsonl"
    rows = [{"prompt": f"the sum of a and {letter}{number} is ", "completion": f"a + {letter}"}
            for letter in "abcd" for number in range(12)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A coordinator, a server, a worker and the service."""
    with running(tmp_path_factory.mktemp("fine-tuning")) as cluster:
        cluster.start_coordinator()
        cluster.start_servers("server-0")
        cluster.start_workers("worker-0")
        cluster.start_fine_tuning()
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> FineTuningClient:
    """A client of the service."""
    return cluster.fine_tuning_client


def recipe(cluster: Cluster, base: Path | str, examples: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A LoRA recipe that trains in seconds; keyword arguments replace keys of sections, or whole values."""
    tree: dict[str, Any] = {
        "name": name,
        "seed": 5,
        "run_root": str(cluster.directory / "runs"),
        "base_model": str(base),
        "lora": {"rank": 4, "alpha": 8},
        "data": {"path": str(examples), "validation_fraction": 0.25},
        "training": {
            "num_steps": NUM_STEPS,
            "num_slots": 2,
            "global_batch": 4,
            "microbatch": 2,
            "sequence_length": 32,
        },
        "optimizer": {"learning_rate": 0.02},
        "validation": {"interval_steps": INTERVAL, "num_exact_match": 6},
    }
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return tree


@pytest.fixture(scope="module")
def made(cluster: Cluster, client: FineTuningClient, base: Path, examples: Path) -> FineTuning:
    """A fine-tuning that has finished."""
    client.create(recipe(cluster, base, examples, "sums"))
    return finished(cluster, client, "sums")


def finished(cluster: Cluster, client: FineTuningClient, name: str) -> FineTuning:
    """The fine-tuning once it has ended; anything but finished fails the test with the logs."""
    try:
        found = client.wait(name, poll_seconds=0.1)
    except FineTuningFailedError as error:
        raise AssertionError(f"{error}\n{cluster.log('fine-tuning')}\n{cluster.log('worker-0')}") from None
    assert found.state == "finished", (found, cluster.log("fine-tuning"))
    return found


def digests(directory: Path) -> dict[str, str]:
    """sha256 of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_a_task_is_learnt(
    cluster: Cluster, client: FineTuningClient, base: Path, made: FineTuning, tmp_path: Path
) -> None:
    assert made.before is not None
    assert made.after is not None
    assert made.examples is not None
    assert made.job is not None
    assert made.examples.num_train + made.examples.num_validation == 48
    # Its head is frozen and small, so the loss cannot fall to nothing.
    assert made.after.loss < made.before.loss - 1.5
    assert made.before.num_prompts == made.after.num_prompts == 6
    assert made.after.num_exact > made.before.num_exact == 0
    assert made.after.version == made.best_version
    assert made.best_version in range(INTERVAL, NUM_STEPS + 1, INTERVAL)
    # Adapters alone travel, a byte an element: one contribution of each slot, and little around it.
    adapter_bytes = made.num_trained_parameters * 2
    assert adapter_bytes <= made.pushed_bytes_per_step < 1.1 * adapter_bytes
    # The history that a watcher gets after the end is that of the job.
    items = list(client.watch("sums"))
    assert isinstance(items[0], FineTuning)
    losses = {item.version: item.loss for item in items if isinstance(item, Validation)}
    assert sorted(losses) == list(range(0, NUM_STEPS + 1, INTERVAL))
    assert losses[0] == made.before.loss
    assert losses[made.after.version] == made.after.loss == min(losses.values())
    assert len([item for item in items if isinstance(item, Step)]) == NUM_STEPS
    # Its metrics are those of its job, by its name.
    rows = list(cluster.client.metrics("sums"))
    assert [row.step for row in rows] == list(range(NUM_STEPS + 1))
    assert {row.step: row.validation_loss for row in rows if row.validation_loss is not None} == losses
    assert rows[-1].num_tokens == cluster.client.job("sums").num_tokens
    picture = tmp_path / "sums.svg"
    assert main(["plot", "sums", "-c", cluster.address, "--to", str(picture)]) == 0
    assert "LoRA on" in picture.read_text()
    assert client.list()[0].name == "sums"


def test_base_and_result_generate(client: FineTuningClient, base: Path, made: FineTuning) -> None:
    assert made.after is not None
    # A prompt that was completed as its example says, when the result was evaluated.
    prompt, expected = next((s.prompt, s.expected) for s in made.after.samples if s.generated == s.expected)
    pieces = list(client.generate("sums", prompt, max_new_tokens=8))
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish_reason == "end-of-text"
    assert [piece.finish_reason for piece in pieces[:-1]] == [""] * (len(pieces) - 1)
    of_base = "".join(piece.text for piece in client.generate("sums", prompt, base=True, max_new_tokens=8))
    by_path = "".join(piece.text for piece in client.generate(None, prompt, base=str(base), max_new_tokens=8))
    assert of_base == by_path != expected
    stopped = list(client.generate("sums", prompt, max_new_tokens=8, stop=["+"]))
    assert "".join(piece.text for piece in stopped) == "a "
    assert stopped[-1].finish_reason == "stop"


def test_exports_load_and_say_the_same(client: FineTuningClient, base: Path, made: FineTuning, tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = digests(base)
    adapter = client.export("sums", tmp_path / "adapter")
    merged = client.export("sums", tmp_path / "merged", kind="merged")
    assert "sums" in (adapter / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(str(merged))
    ids = torch.tensor([tokenizer("the sum of a and b2 is ", add_special_tokens=False)["input_ids"]])
    on_base = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base)), str(adapter))
    whole = AutoModelForCausalLM.from_pretrained(str(merged))
    with torch.no_grad():
        torch.testing.assert_close(on_base(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)
    assert digests(base) == before


def test_killed_service_goes_on(
    cluster: Cluster, client: FineTuningClient, base: Path, examples: Path, made: FineTuning
) -> None:
    """SIGKILL while the job trains: the next service follows the same job to the same bits."""
    client.create(recipe(cluster, base, examples, "killed"))
    client.wait("killed", until=lambda now: now.state == "training", poll_seconds=0.02)
    # At rest, so that it is still training when the service is back.
    client.pause("killed")
    trained = client.wait("killed", until=lambda now: now.job is not None and now.job.state == "paused")
    assert trained.job is not None
    cluster.kill("fine-tuning")
    cluster.start_fine_tuning()
    found = client.get("killed")
    assert found.state == "training"
    assert found.job is not None
    assert found.job.job_id == trained.job.job_id
    client.resume("killed")
    found = finished(cluster, client, "killed")
    assert found.job is not None
    assert made.job is not None
    assert found.after == made.after
    assert found.best_version == made.best_version
    assert cluster.final_digest(found.job.job_id) == cluster.final_digest(made.job.job_id)
    assert [job.name for job in cluster.client.jobs()].count("killed") == 1
    # What had finished before is as it was.
    assert client.get("sums").after == made.after


def test_cancelled_and_resumed(cluster: Cluster, client: FineTuningClient, base: Path, examples: Path) -> None:
    client.create(recipe(cluster, base, examples, "stopped", validation={"interval_steps": 2}))
    client.wait("stopped", until=lambda now: now.best_version is not None, poll_seconds=0.02)
    client.pause("stopped")
    client.wait("stopped", until=lambda now: now.job is not None and now.job.state == "paused")
    cancelled = client.cancel("stopped")
    assert cancelled.state == "cancelled"
    assert cancelled.job is not None
    assert cancelled.job.state == "stopped"
    with pytest.raises(ConfigError, match="'stopped' already, which is cancelled; choose another name, or go on"):
        client.create(recipe(cluster, base, examples, "stopped"))
    # There is a version, so it can be used.
    assert list(client.generate("stopped", "the sum of ", max_new_tokens=2))
    client.resume("stopped")
    assert finished(cluster, client, "stopped").after is not None


def test_a_full_fine_tuning_of_a_jobs_result(
    cluster: Cluster, client: FineTuningClient, base: Path, examples: Path
) -> None:
    """Full fine-tuning, and a LoRA on its newest checkpoint."""
    full = recipe(cluster, base, examples, "whole", method="full", optimizer={"learning_rate": 0.005})
    client.create(full)
    whole = finished(cluster, client, "whole")
    assert whole.before is not None
    assert whole.after is not None
    assert whole.job is not None
    assert whole.after.loss < whole.before.loss
    job_id, service = whole.job.job_id, cluster.fine_tuning_address
    said = list(cluster.client.generate(job_id, "the sum of ", max_new_tokens=4, service=service))
    assert said == list(client.generate(None, "the sum of ", base=f"job:{job_id}", max_new_tokens=4))
    with pytest.raises(ConfigError, match="no adapter"):
        client.export("whole", cluster.directory / "nothing", kind="adapter")
    on_top = recipe(cluster, f"job:{whole.job.job_id}", examples, "on-top", training={"num_steps": 2})
    client.create(on_top)
    top = finished(cluster, client, "on-top")
    assert top.base == f"job:{whole.job.job_id}@{NUM_STEPS}"
    assert top.before is not None
    # A job pulls int8 differences; its last version is what the checkpoint holds.
    assert top.before.loss == pytest.approx(whole.after.loss, rel=0.5)


def test_examples_that_are_sent(
    cluster: Cluster, client: FineTuningClient, base: Path, examples: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sent = client.upload(examples)
    assert hashlib.sha256(Path(sent).read_bytes()).hexdigest() in sent
    assert client.preview(recipe(cluster, base, examples, "shown"), upload=True).report.num_rows == 48
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(cluster, base, examples, "shown")))
    service = ["--service", cluster.fine_tuning_address]
    assert main(["finetune", "create", str(path), "--upload", "--dry-run", "-n", "2", *service]) == 0
    text = capsys.readouterr().out
    assert "⟦a + " in text
    assert "48 rows of prompt-completion: " in text
    assert "shown" not in [each.name for each in client.list()]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base_model": "/nowhere/at/all"}, FineTuningFailedError, "/nowhere/at/all"),
        ({"base_model": "job:sums-1"}, FineTuningFailedError, "adapter"),
        ({"base_model": "job:nothing-1"}, FineTuningFailedError, "no job 'nothing-1'"),
        ({"data": {"path": "/nowhere.jsonl"}}, DataError, "send the file with --upload"),
        ({"lora": {"target_modules": ["q_prog"]}}, FineTuningFailedError, "q_proj"),
        ({"training": {"sequence_length": 65}}, FineTuningFailedError, "longer than the 64 positions of llama"),
        ({"training": {"sequence_length": 6}}, FineTuningFailedError, "training.sequence_length is 6"),
        ({"training": {"microbatch": 3}}, ConfigError, "not divisible by microbatch 3"),
        ({"name": "sums"}, ConfigError, "'sums' already, which is finished; choose another name"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    change: dict[str, Any], error: type[Exception], message: str,
    cluster: Cluster, client: FineTuningClient, base: Path, examples: Path, made: FineTuning,
) -> None:  # fmt: skip
    tree = recipe(cluster, base, examples, **{"name": "bad", **change})
    with pytest.raises(error) as caught:
        client.wait(client.create(tree).name, poll_seconds=0.05)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # Nothing of it is in the way of the next attempt, nor in the cluster.
    assert "bad" not in [job.name for job in cluster.client.jobs()]


def test_bad_requests_are_one_line(
    cluster: Cluster, client: FineTuningClient, made: FineTuning, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no fine-tuning 'summs'; did you mean 'sums'"):
        list(client.generate("summs", "x"))
    with pytest.raises(ConfigError, match=f"{POSITIONS} positions"):
        list(client.generate("sums", "a " * POSITIONS))
    with pytest.raises(CheckpointError, match="no checkpoint of version 5; there are: 30, 45, 60"):
        client.export("sums", tmp_path / "export", version=5)
    with pytest.raises(ConfigError, match="sums is finished; there is nothing to resume"):
        client.resume("sums")
    with pytest.raises(ConfigError, match="sums is already finished"):
        client.cancel("sums")
    assert not (tmp_path / "export").exists()


def test_health_tells_the_truth_and_sigterm_ends_it(cluster: Cluster, made: FineTuning) -> None:
    def health() -> int:
        with grpc.insecure_channel(cluster.fine_tuning_address) as channel:
            request = health_pb2.HealthCheckRequest(service="gradstream.proto.v1.FineTuningService")
            return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status)

    wait_until(lambda: health() == health_pb2.HealthCheckResponse.SERVING, "the service to be healthy", 20)
    # Without a coordinator nothing can be begun; what there is can be looked at and used.
    cluster.kill("coordinator")
    wait_until(lambda: health() == health_pb2.HealthCheckResponse.NOT_SERVING, "the service to be unhealthy", 60)
    found = cluster.fine_tuning_client.get("sums")
    assert found.after == made.after
    assert "does not answer" in found.reason
    assert list(cluster.fine_tuning_client.generate("sums", "the sum of ", max_new_tokens=2))
    cluster.start_coordinator()
    wait_until(lambda: health() == health_pb2.HealthCheckResponse.SERVING, "the service to be healthy again", 60)
    cluster.terminate("fine-tuning")
    assert "Traceback" not in cluster.log("fine-tuning")
