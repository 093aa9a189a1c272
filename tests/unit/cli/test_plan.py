"""`gradstream plan`: with a live cluster's nodes, or with nodes that need not exist."""

from __future__ import annotations

import importlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from canned_jobs import CannedJobs, canned_node
from support.tiny import LLAMA

from gradstream.coordinator.cli import main
from gradstream.coordinator.cli.options import find_recipe, parse_bit_rate
from gradstream.coordinator.planning import recipe_forecast
from gradstream.coordinator.planning.inventory import Inventory
from gradstream.core.errors import ConfigError
from gradstream.core.model.model import inventory
from gradstream.core.model.profile import SegmentProfile, Workload, profile_segments
from gradstream.core.recipe.loading import load_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.proto.v1 import coordinator_pb2

NEEDLESS = ["--workers", "4", "--servers", "2"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADSTREAM_COORDINATOR", "GRADSTREAM_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    tree = {
        "name": "tiny",
        "model": {"config": LLAMA},
        "training": {"num_steps": 1, "num_slots": 4, "global_batch": 8, "microbatch": 1, "sequence_length": 32},
        "data": {"path": str(tmp_path / "nowhere")},
    }
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is looked at in this process: a child takes seconds to import what is imported here."""

    async def look(recipe: Recipe) -> tuple[Inventory, list[SegmentProfile], list[str]]:
        config = recipe.model.config
        found = Inventory(tuple(inventory(config)), "LlamaForCausalLM", 0)
        return found, profile_segments(config, Workload.of(recipe.training)), []

    monkeypatch.setattr(recipe_forecast, "_measured", look)


def test_a_plan_for_people(recipe: str, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "-s", "pipeline.stages=2", "-s", "pipeline.schedule=1f1b", *NEEDLESS]) == 0
    captured = capsys.readouterr()
    for part in (
        "parameters on 2 servers, 4 workers",
        "0      0      embedding",  # and more or less of the layers, by what they took just now
        "worker in place 1  worker-2, worker-3",
        "parameter server   server-1",
        "push         worker in place 0  server-0",
        "activations  stage 0            stage 1",
        "a step takes about ",
        "for 4 microbatches a replica, ",
        "of it idle in the pipeline; push ",
        "stages     2, in 2 replicas of 2 workers, cut after ",
        "schedule   1f1b as pipeline.schedule says",
    ):
        assert part in captured.out, part
    assert captured.err.startswith("warning: data.path ")
    assert "holds no data set yet, so the data was not checked" in captured.err


def test_a_plan_of_a_large_cluster_is_summed_up(recipe: str, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["-s", "model.config.num_hidden_layers=14", "-s", "pipeline.stages=12", "-s", "pipeline.schedule=1f1b"]
    assert main(["plan", recipe, *layers, "--workers", "26", "--servers", "10", "--memory", "1GiB"]) == 0
    out = capsys.readouterr().out
    rows = [line.split("  ")[0] for line in out.splitlines()]
    assert rows.count("push") == rows.count("pull") == 2
    assert rows.count("activations") == rows.count("gradients") == 1
    assert "10 servers " in rows or "10 servers" in rows
    places = [row for row in rows if row.startswith("worker")]
    assert places[0].startswith("worker in place 0") or places[0].startswith("workers in place 0 to ")
    assert places[-1].endswith("11")
    assert "all 10 that were live (server-0, server-1, server-2, server-3 and 6 more), led by server-0" in out
    assert " and 7 more\n" in out, "of 11 cuts"
    assert "2 more workers stay idle" in out
    assert len(out.splitlines()) < 60


def test_a_plan_without_a_pipeline(recipe: str, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--workers", "2", "--link", "100Mb/s", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_replicas"], len(found["servers"]), found["bubble"]) == (2, 1, pytest.approx(0))
    assert found["link_bits_per_second"] == 1e8
    assert [stage["segments"][0] for stage in found["stages"]] == ["embedding"]
    assert set(found["reasons"]) == {"servers", "placement", "memory", "start"}


def test_a_live_cluster_is_asked(
    recipe: str, here: None, jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = coordinator_pb2.NODE_KIND_PARAMETER_SERVER
    jobs.nodes = [
        canned_node("server-0", kind=server),
        canned_node("worker-0"),
        canned_node("worker-1"),
        canned_node("worker-2", alive=False),
    ]
    assert main(["plan", recipe, "-s", "pipeline.stages=2", "-c", address, "-o", "json"]) == 0
    places = json.loads(capsys.readouterr().out)["places"]
    assert [(place["workers"], place["offered_bytes"]) for place in places] == [
        (["worker-0"], 1 << 30),
        (["worker-1"], 1 << 30),
    ]
    jobs.nodes = jobs.nodes[1:]
    assert main(["plan", recipe, "-c", address]) == 5
    assert "no parameter server is live" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*NEEDLESS, "-s", "trainin.x=1"], 2, "did you mean 'training'?"),
        ([*NEEDLESS, "-s", "seed"], 2, "override 'seed' is not of the form key.sub=value"),
        ([*NEEDLESS, "--link", "fast"], 2, "'fast' is not a link's speed; write it in bits a second, like 1Gb/s"),
        ([*NEEDLESS, "--memory", "much"], 2, "'much' is not a size"),
        (["--memory", "1GiB"], 2, "also give --workers or --servers"),
        ([*NEEDLESS, "-s", "pipeline.stages=9"], 5, "pipeline.stages 9 needs 9 workers, 4 are live"),
        ([*NEEDLESS, "-s", "pipeline.stages=3", "-s", "pipeline.chunks=2"], 2, "stages 3 is not divisible by chunks 2"),
        (["--workers", "5", "-s", "pipeline.stages=5"], 2, "pipeline.stages 5 is more than the model's 4 segments"),
        ([*NEEDLESS, "--memory", "256KiB", "-s", "pipeline.stages=2"], 5, " missing); "),
    ],
)
def test_errors_are_one_line(
    recipe: str, here: None, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe, *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("warning: data.path")]
    assert len(lines) == 1
    assert message in lines[0]


def test_without_a_coordinator(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    assert main(["plan", recipe, "-c", address]) == 7
    error = capsys.readouterr().err
    assert error.endswith("or plan for a cluster that need not exist: --workers 4 --servers 2\n")
    assert error.count("\n") == 1


def test_a_family_that_cannot_be_cut(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In child processes, as it really is: whole it can be planned, without times; in stages it cannot."""
    tree: dict[str, Any] = yaml.safe_load(Path(recipe).read_text())
    opt = {"model_type": "opt", "vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    tree["model"]["config"] = {**opt, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    Path(recipe).write_text(yaml.safe_dump(tree))
    assert main(["plan", recipe, *NEEDLESS]) == 0
    captured = capsys.readouterr()
    assert "a step takes" not in captured.out
    assert "warning: times are not known: model.config: 'model.decoder.final_layer_norm' lies before" in captured.err
    assert main(["plan", recipe, *NEEDLESS, "-s", "pipeline.stages=2"]) == 2
    assert "so the model cannot be cut into pipeline stages; use stages: 1" in capsys.readouterr().err


def test_the_demo_in_stages_asks_for_four_workers() -> None:
    recipe = load_recipe(find_recipe("stdlib-gpt-pipeline"))
    assert (recipe.name, recipe.pipeline.stages, recipe.cluster.min_workers) == ("stdlib-gpt-pipeline", 2, 4)
    assert recipe.model == load_recipe(find_recipe("stdlib-gpt")).model


@pytest.mark.parametrize(
    ("arguments", "started"),
    [
        (["stdlib-gpt"], (2, 2)),
        (["stdlib-gpt-pipeline"], (2, 4)),
        (["stdlib-gpt-far"], (2, 2)),
        (["stdlib-gpt", "-s", "pipeline.stages=3", "-s", "cluster.min_servers=3"], (3, 3)),
        (["stdlib-gpt-pipeline", "--workers", "6", "--servers", "2"], (2, 6)),
    ],
)
def test_dev_starts_what_the_recipe_asks_for(
    arguments: list[str], started: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("gradstream.coordinator.cli.dev")
    found: list[tuple[int, int]] = []

    class Run:
        job = exported = None

        def __init__(self, recipe: Recipe, servers: int, workers: int, keep: bool, fine_tuning: bool):
            found.append((servers, workers))

        async def run(self) -> int:
            return 0

    monkeypatch.setattr(module, "prepare_data", lambda recipe: None)
    monkeypatch.setattr(module, "_Run", Run)
    assert main(["dev", *arguments]) == 0
    assert found == [started]


def test_dev_refuses_fewer_workers_than_a_replica_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dev", "stdlib-gpt", "-s", "pipeline.stages=3", "--workers", "2"]) == 2
    assert "--workers 2 is fewer than the 3 that pipeline.stages=3 needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "rate"), [("1Gb/s", 1e9), ("100Mb/s", 1e8), ("2.5g", 2.5e9), ("10Gbit/s", 1e10), ("5 kbps", 5e3)]
)
def test_link_speeds(text: str, rate: float) -> None:
    assert parse_bit_rate(text) == rate
    with pytest.raises(ConfigError, match="is not a link's speed"):
        parse_bit_rate(text + "x")


LOCAL = ["-s", "training.num_steps=30", "-s", "local.steps=30", "-s", "codec.push=int8"]


def test_the_plan_of_a_job_with_local_steps(recipe: str, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", recipe, "--workers", "2", "--link", "1Mb/s", "-o", "json"]

    def forecast(*more: str) -> dict[str, Any]:
        assert main([*arguments, *more]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    plain, reset = forecast("-s", "codec.push=int8"), forecast(*LOCAL, "-s", "local.inner_state=reset")
    shared, exact = (forecast(*LOCAL, "-s", f"local.moments={codec}") for codec in ("bf16", "fp32"))
    assert (plain["round_steps"], reset["round_steps"]) == (0, 30)
    # Without moments a round sends what a step sends; both moments are as large as the weights, one for each slot.
    assert reset["links"] == plain["links"]
    assert reset["worker_step_bytes"] == pytest.approx(plain["worker_step_bytes"] / 30)
    (pushed, pulled), size = (link["step_bytes"] for link in plain["links"]), shared["num_parameters"]
    assert [link["step_bytes"] for link in shared["links"]] == [pushed + 2 * 2 * 2 * size, pulled + 2 * 2 * size]
    assert [link["step_bytes"] for link in exact["links"]] == [pushed + 2 * 2 * 4 * size, pulled + 2 * 4 * size]
    # The first of two slots is sent after half of the compute. The version comes while the second one is sent, and a
    # round begins when all of it has come.
    push, pull, compute = shared["push_seconds"], shared["pull_seconds"], shared["compute_seconds"]
    exposed = max(push / 2, push - compute / 2) + max(0.0, pull - push / 2)
    assert shared["exposed_seconds"] == pytest.approx(exposed)
    assert shared["step_seconds"] == pytest.approx((compute + shared["exposed_seconds"]) / 30)
    assert shared["utilisation"] == pytest.approx(compute / (compute + shared["exposed_seconds"]))
    assert shared["tokens_per_second"] == pytest.approx(8 * 32 / shared["step_seconds"])


def test_the_plan_of_local_steps_for_people(recipe: str, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--workers", "2", *LOCAL]) == 0
    out = capsys.readouterr().out
    assert "BYTES A ROUND" in out
    for part in (
        "a round of 30 steps takes about ",
        "microbatches a replica in each inner step; push ",
        " steps/s; a ",
    ):
        assert part in out, part
    assert "B an inner step, and computes " in out


def test_the_demo_for_slow_links_has_the_model_of_the_demo() -> None:
    recipe = load_recipe(find_recipe("stdlib-gpt-far"))
    assert recipe.model == load_recipe(find_recipe("stdlib-gpt")).model
    assert recipe.local is not None
    assert (recipe.local.steps, recipe.local.inner_state, recipe.rounds.last_version) == (30, "shared", 8)
    assert (recipe.codec.push, recipe.codec.pull) == ("int4", "delta-int4")


def test_a_slow_link_is_answered_with_rounds(recipe: str, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", recipe, "--workers", "2", "-s", "training.num_steps=31", "-s", "optimizer.moments=bf16"]
    assert main([*arguments, "--link", "1b/s"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("every ")]
    assert [row.split("  ")[0] for row in rows[::2]] == [
        "every step",
        "every 5 steps",
        "every 10 steps",
        "every 30 steps",
        "every 100 steps",
    ]
    assert ["advised" in row for row in rows] == [False] * 9 + [True], "even that is too slow"
    settings = out.split("settings: ")[1].split("\nservers")[0].replace("-s ", "").split()
    assert settings == [
        "local.steps=100",
        "codec.push=int2",
        "codec.pull=delta-int2",
        "training.num_steps=100",
        "optimizer.moments=fp32",
    ]
    # The settings make a plan whose cost is the option's.
    overrides = [part for setting in settings for part in ("-s", setting)]
    assert main([*arguments, *overrides, "--link", "1b/s", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (advised,) = [option for option in found["options"] if option["advised"]]
    assert advised["utilisation"] == pytest.approx(found["utilisation"])
    assert advised["worker_step_bytes"] == pytest.approx(found["worker_step_bytes"])


def test_a_fast_link_needs_no_rounds(recipe: str, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--workers", "2", "--link", "1000Gb/s"]) == 0
    out = capsys.readouterr().out
    assert "exchange   ordinary steps with int8 and delta-int8: workers compute " in out
    assert "local steps are not needed\n" in out
    assert "every step" not in out
