"""Plans, leases and decisions about a job, as pure functions."""

from __future__ import annotations

from pathlib import Path

import pytest
from coordinator_fakes import make_manifest, make_recipe

from gradstream.coordinator.jobs.active import Pace, WaitClock
from gradstream.coordinator.jobs.decisions import (
    Ending,
    JobSight,
    judge_end,
    lease_slots,
    missing_nodes,
    next_job,
    order_text,
)
from gradstream.coordinator.nodes.reunion import ServerSight, Verdict, judge_servers
from gradstream.coordinator.planning.inventory import Inventory
from gradstream.coordinator.planning.needs import NodeOffer, ServerBytes, human_bytes, server_bytes
from gradstream.coordinator.planning.planner import CheckpointAt, NextEpoch, check_data, make_plan
from gradstream.coordinator.state.state import JobRecord
from gradstream.coordinator.timing import judge_wait
from gradstream.core.errors import DataError, PlanError
from gradstream.core.plan.fragments import Tensor, cut
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.wire.stream_limits import more_than_usual_bytes, traffic
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

TENSORS = [Tensor(f"layer.{unit}", (64, 64), True, unit) for unit in range(8)]
RUNNING, PAUSED = jobs_pb2.JOB_STATE_RUNNING, jobs_pb2.JOB_STATE_PAUSED
PLANNING, STOPPED = jobs_pb2.JOB_STATE_PLANNING, jobs_pb2.JOB_STATE_STOPPED

FIRST = NextEpoch("j", 1, None, "/c")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path)


def offers(count: int, memory: int = 1 << 30) -> list[NodeOffer]:
    return [NodeOffer(f"ps-{n}.00", f"ps-{n}", f"host:{n + 1}", memory) for n in range(count)]


def model(tensors: list[Tensor] = TENSORS) -> Inventory:
    return Inventory(tuple(tensors), "LlamaForCausalLM", 0)


def plan(recipe: Recipe, servers: list[NodeOffer], tensors: list[Tensor] = TENSORS) -> tuple[Plan, dict[str, str]]:
    at = NextEpoch("tiny-1", 1, None, "/runs/tiny-1/checkpoints")
    return make_plan(at, recipe, make_manifest(), model(tensors), servers, [])


def test_a_plan_is_balanced_and_reads_back(recipe: Recipe) -> None:
    made, reasons = plan(recipe, offers(3))
    loads = [sum(fragment.num_bytes for fragment in made.fragments_of(server)) for server in range(3)]
    assert max(loads) - min(loads) <= 2 * 1024
    assert Plan.from_proto(made.to_proto()) == made
    assert set(reasons) == {"servers", "placement", "memory", "start"}


def test_a_model_of_too_many_fragments_is_refused_before_it_is_cut(recipe: Recipe) -> None:
    huge = [Tensor("embedding", (10**9, 10**6), True, 0)]
    with pytest.raises(PlanError, match=r"raise cluster\.fragment_bytes"):
        make_plan(FIRST, recipe, make_manifest(), model(huge), offers(1), [])


@pytest.mark.parametrize("text_config", [[1], "x", 3, {}, {"vocab_size": "x"}, None])
def test_a_model_config_of_odd_parts_is_no_error_of_the_data(recipe: Recipe, text_config: object) -> None:
    config = {key: value for key, value in recipe.model.config.items() if key != "vocab_size"}
    changed = recipe.model.model_copy(update={"config": config | {"text_config": text_config}})
    check_data(recipe.model_copy(update={"model": changed}), make_manifest())


def test_a_plan_does_not_depend_on_the_order_of_servers(recipe: Recipe) -> None:
    assert plan(recipe, offers(3))[0] == plan(recipe, offers(3)[::-1])[0]


def test_never_more_servers_than_fragments(recipe: Recipe) -> None:
    made, reasons = plan(recipe, offers(3), [Tensor("t", (8,), False, 0)])
    assert [server.name for server in made.servers] == ["ps-0"]
    assert "2 more stay idle" in reasons["servers"]


def test_a_plan_starts_from_its_checkpoint(recipe: Recipe) -> None:
    at = CheckpointAt(6, "/c/step-00000006")
    made, _ = make_plan(NextEpoch("j", 3, at, "/c"), recipe, make_manifest(), model(), offers(1), [])
    assert (made.epoch, made.start_version, made.checkpoint_path) == (3, 6, "/c/step-00000006")


def test_a_model_too_big_names_server_sizes_and_cure(recipe: Recipe) -> None:
    with pytest.raises(PlanError) as caught:
        plan(recipe, offers(2, memory=200_000))
    message = str(caught.value)
    assert "\n" not in message
    for part in ("parameter server ps-0 needs", "offers 195.3 KiB", "missing", "start ", "smaller model"):
        assert part in message


def with_slots(recipe: Recipe, num_slots: int) -> Recipe:
    training = recipe.training.model_copy(update={"num_slots": num_slots})
    return recipe.model_copy(update={"training": training})


@pytest.mark.parametrize("num_slots", [200, 1000])
@pytest.mark.parametrize("is_served", [True, False])
def test_a_job_of_many_workers_is_served_or_refused(recipe: Recipe, num_slots: int, is_served: bool) -> None:
    """Never planned and then hung for want of streams."""
    cluster = recipe.cluster.model_copy(update={"fragment_bytes": 4 << 20})
    recipe = with_slots(recipe.model_copy(update={"cluster": cluster}), num_slots)
    large = [Tensor(f"layer.{unit}", (4096, 4096), True, unit) for unit in range(4)]

    def planned(memory: int) -> Plan:
        return make_plan(FIRST, recipe, None, model(large), offers(2, memory), [])[0]

    unbounded = planned(0)
    needed = server_bytes(recipe, unbounded.fragments_of(0), large).most
    streams = more_than_usual_bytes(num_slots, traffic(unbounded)[0])
    assert streams > 100 << 20
    if is_served:
        assert planned(needed + streams).max_workers == num_slots
        return
    with pytest.raises(PlanError) as caught:
        planned(needed + streams - 1)
    message = str(caught.value)
    assert "\n" not in message
    assert f"up to {num_slots} workers may share this job (training.num_slots is {num_slots})" in message
    assert "lower training.num_slots, or give it more memory" in message


def test_the_memory_of_streams_follows_what_a_plan_sends(recipe: Recipe) -> None:
    """A tiny model's contributions never fill the windows of 1,000 workers."""
    codec = recipe.codec.model_copy(update={"push": "bf16"})
    recipe = with_slots(recipe.model_copy(update={"codec": codec}), 1000)
    made = make_plan(FIRST, recipe, None, model(), offers(2), [])[0]
    for peers, server in zip(traffic(made), range(2), strict=True):
        assert peers.contribution_bytes >= max(
            sum(2 * fragment.num_elements for fragment in bundle.fragments) for bundle in made.bundles_of(server)
        )
        assert peers.step_bytes == 1000 * sum(2 * fragment.num_elements for fragment in made.fragments_of(server))
        assert not more_than_usual_bytes(1000, peers)


def test_a_server_that_did_not_say_its_memory_is_believed(recipe: Recipe) -> None:
    made, _ = plan(recipe, offers(1, memory=0))
    assert len(made.servers) == 1


def test_a_cluster_of_small_workers_cannot_take_the_model(recipe: Recipe) -> None:
    worker = NodeOffer("w.00", "w", "", 1000)
    with pytest.raises(PlanError, match="worker w needs"):
        make_plan(FIRST, recipe, make_manifest(), model(), offers(1), [worker])


def test_the_memory_of_a_server_is_predicted(recipe: Recipe) -> None:
    tensors = [Tensor("t", (1024,), True, 0)]
    fragments = cut(tensors, 1024)

    def needed(of: list[Tensor] = tensors, **codec: str) -> ServerBytes:
        both = {"push": "bf16", "pull": "bf16", **codec}
        changed = recipe.model_copy(update={"codec": recipe.codec.model_copy(update=both)})
        return server_bytes(changed, fragments, of)

    # adamw, bf16 both ways, 2 slots: 20 bytes of arrays, 12 for a checkpoint in flight and 2 published an element;
    # 2 slots × 2 bytes that wait. A sum has 8 bytes an element, and one a block of 256.
    assert needed() == ServerBytes(22 * 1024 + 4, 12 * 1024, 0, 4 * 1024)
    # Differences: the reference in fp32, which is saved too, one difference, and the whole for a newcomer.
    int8 = 1024 + 16
    assert needed(pull="delta-int8", push="int8") == ServerBytes(24 * 1024 + 4 + int8, 16 * 1024, 4 * 1024, 2 * int8)
    # Changed bits: the encoded weights are what workers hold; nothing more is saved. A plane has a header of 4 bytes.
    assert needed(pull="xor-fp32") == ServerBytes(24 * 1024 + 4 + 4 * 1028, 12 * 1024, 4 * 1024, 4 * 1024)
    assert needed(pull="xor-bf16") == ServerBytes(22 * 1024 + 4 + 2 * 1028, 12 * 1024, 2 * 1024, 4 * 1024)
    # What is no matrix is sent finer, but for differences to embeddings.
    for kind, embedding in (("vector", 2048), ("embedding", int8)):
        other = [Tensor("t", (1024,), True, 0, kind)]
        found = needed(other, push="int4", pull="int8", embedding="int8")
        assert (found.state - (20 * 1024 + 4), found.early) == (embedding, 2 * embedding)
    table = [Tensor("t", (1024,), True, 0, "embedding")]
    assert needed(table, push="int4", pull="delta-int4").state == 24 * 1024 + 4 + 512 + 16
    sgd = recipe.model_copy(
        update={
            "optimizer": recipe.optimizer.model_copy(update={"kind": "sgd"}),
            "codec": recipe.codec.model_copy(update={"push": "int8", "pull": "fp32"}),
        }
    )
    assert server_bytes(sgd, fragments, tensors) == ServerBytes(20 * 1024 + 4, 8 * 1024, 0, 2 * int8)
    assert needed().most == sum((22 * 1024 + 4, 12 * 1024, 4 * 1024))


def test_vocabulary_mismatch_names_both_and_the_cure(recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"has 65 tokens, the model's vocab_size is 64; set model.config.vocab_size=65"):
        check_data(recipe, make_manifest(vocab_size=65))


def test_each_slot_needs_a_sample(recipe: Recipe) -> None:
    check_data(recipe, make_manifest(num_train=3))
    with pytest.raises(
        DataError, match=r"the data set has 0 train samples of \d+ tokens, too few for 2 slots; add text"
    ):
        check_data(recipe, make_manifest(num_train=0))


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (5, 2048, 3 << 20, 5 << 30, 7 << 40)] == [
        "5 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "7.0 TiB",
    ]


def test_the_queue_is_first_in_first_out_with_resumed_jobs_first() -> None:
    jobs = [JobRecord(name, name, "", "", "", 0, rank=rank) for name, rank in (("b", 2), ("a", 1), ("r", -1))]
    found = next_job(jobs)
    assert found is not None
    assert found.job_id == "r"
    assert next_job([]) is None


def test_missing_nodes_are_told_in_words(recipe: Recipe) -> None:
    assert missing_nodes(recipe, 1, 0, need_workers=True) == [
        ("2 parameter servers, 1 is live", "a parameter server to register"),
        ("1 worker, none is live", "a worker to register"),
    ]
    assert missing_nodes(recipe, 2, 0, need_workers=False) == []


@pytest.mark.parametrize(
    ("sight", "verdict"),
    [
        (ServerSight("s", True, True, False, 0), Verdict.HOLD),
        (ServerSight("s", False, False, False, 1), Verdict.WAIT),
        (ServerSight("s", False, True, False, 0), Verdict.LOST),
        (ServerSight("s", True, False, False, 0), Verdict.LOST),
        (ServerSight("s", False, False, True, 1), Verdict.LOST),
        (ServerSight("s", False, False, False, 1, refuses=True), Verdict.LOST),
        (ServerSight("s", True, True, False, 1, failure="disk full"), Verdict.LOST),
    ],
)
def test_the_verdict_on_servers(sight: ServerSight, verdict: Verdict) -> None:
    here = ServerSight("here", True, True, False, 0)
    assert judge_servers([here, sight])[0] is verdict


@pytest.mark.parametrize(
    ("desired", "state", "halted", "checkpoints", "worker", "text"),
    [
        ("run", RUNNING, None, set(), True, ""),
        ("pause", RUNNING, None, set(), True, "pausing at the end of step 31; a checkpoint follows"),
        ("stop", RUNNING, None, {20}, True, "stopping at the end of step 31; a checkpoint follows"),
        ("stop", RUNNING, 31, {20}, True, "stopping at version 31; its checkpoint is written"),
        ("stop", RUNNING, 31, {31}, True, "stopping at version 31"),
        ("stop", PAUSED, None, {20}, True, "stopping at version 31; its checkpoint is written"),
        (
            "stop",
            RUNNING,
            None,
            set(),
            False,
            "stopping at version 31; no worker is live to finish the step, a checkpoint follows",
        ),
        ("pause", PLANNING, None, set(), True, "pausing once its servers are back or given up"),
        ("pause", PAUSED, 31, set(), True, ""),
        ("stop", STOPPED, 31, {31}, True, ""),
    ],
)
def test_an_order_under_way_in_words(
    desired: str,
    state: jobs_pb2.JobState.ValueType,
    halted: int | None,
    checkpoints: set[int],
    worker: bool,
    text: str,
) -> None:
    assert order_text(JobSight(desired, state, 31, Rounds(100), halted, checkpoints, False, worker)) == text


@pytest.mark.parametrize(
    ("waited", "step_seconds", "late", "reason"),
    [
        (1.9, 0.1, False, "2 s of at most 2 s on the way of a step; a step usually takes 0.1 s"),
        (2.0, 0.1, True, "no progress for 2 s; a step usually takes 0.1 s"),
        (14.0, 5.0, False, "14 s of at most 15 s on the way of a step; a step usually takes 5 s"),
        (16.0, 5.0, True, "no progress for 16 s; a step usually takes 5 s"),
        (9.0, None, False, "9 s of at most 10 s on the way of a step; no step time is known yet"),
        (10.0, None, True, "no progress for 10 s; no step time is known yet"),
    ],
)
def test_a_step_is_late_by_what_one_usually_takes(
    waited: float, step_seconds: float | None, late: bool, reason: str
) -> None:
    assert judge_wait(waited, step_seconds) == (late, reason)


@pytest.mark.parametrize(
    ("desired", "state", "version", "halted", "checkpoints", "validated", "worker", "ending"),
    [
        ("run", RUNNING, 4, None, {4}, True, True, Ending.FINISH),
        ("run", RUNNING, 4, None, set(), True, True, Ending.GO_ON),
        ("run", RUNNING, 4, None, {4}, False, True, Ending.GO_ON),
        ("run", RUNNING, 3, 3, {3}, True, True, Ending.GO_ON),
        ("pause", RUNNING, 3, None, set(), False, True, Ending.GO_ON),
        ("pause", RUNNING, 3, 3, set(), False, True, Ending.PAUSE),
        ("pause", RUNNING, 3, None, set(), False, False, Ending.PAUSE),
        ("pause", PAUSED, 3, 3, set(), False, True, Ending.GO_ON),  # the leader's checkpoint is on its way
        ("pause", PAUSED, 3, 2, set(), False, True, Ending.SNAPSHOT),  # a step was under way
        ("pause", PAUSED, 3, None, set(), False, True, Ending.SNAPSHOT),
        ("pause", PAUSED, 3, None, {3}, False, True, Ending.GO_ON),
        ("pause", PAUSED, 0, None, set(), False, False, Ending.GO_ON),
        ("stop", RUNNING, 3, 3, set(), False, True, Ending.GO_ON),
        ("stop", RUNNING, 3, 3, {3}, False, True, Ending.STOP),
        ("stop", RUNNING, 3, 2, {2}, False, True, Ending.STOP),  # a step was under way
        ("stop", RUNNING, 3, None, {3}, False, True, Ending.GO_ON),
        # Nobody finishes the step: the servers write what they hold.
        ("stop", RUNNING, 3, None, set(), False, False, Ending.SNAPSHOT),
        ("stop", RUNNING, 3, None, {3}, False, False, Ending.STOP),
        ("stop", PAUSED, 3, None, set(), False, True, Ending.SNAPSHOT),
        ("stop", PAUSED, 3, None, {3}, False, True, Ending.STOP),
        ("stop", RUNNING, 0, None, set(), False, False, Ending.STOP),  # nothing was computed
        ("stop", RUNNING, 4, None, {4}, False, True, Ending.STOP),
    ],
)
def test_how_a_job_ends(
    desired: str,
    state: jobs_pb2.JobState.ValueType,
    version: int,
    halted: int | None,
    checkpoints: set[int],
    validated: bool,
    worker: bool,
    ending: Ending,
) -> None:
    sight = JobSight(desired, state, version, Rounds(4), halted, checkpoints, validated, worker)
    assert judge_end(sight)[0] is ending


def test_leases_rest_and_are_told_by_name() -> None:
    assert lease_slots(["a", "b"], ["a", "b"], True, {})[0] == ["", ""]
    holders, reason = lease_slots(["", ""], ["a", "b"], False, {"a": "A", "b": "B"})
    assert holders == ["a", "b"]
    assert "A: 0; B: 1" in reason


def test_the_pace_falls_when_steps_stop() -> None:
    pace = Pace()
    for step in range(5):
        pace.add(coordinator_pb2.ReportStepRequest(step=step, num_tokens=10, pushed_bytes=7, unix_ms=step * 1000), step)
    assert pace.per_second(4.0, Rounds(9)) == (1.0, 10.0, 7.0)
    assert pace.per_second(100.0, Rounds(9))[0] < 0.05
    assert Pace().per_second(1.0, Rounds(9)) == (0.0, 0.0, 0.0)


def test_a_wait_keeps_the_time_it_began() -> None:
    clock = WaitClock()
    clock.stamp([("a", "x")], 100)
    assert [wait.since_unix_ms for wait in clock.stamp([("a", "x"), ("b", "y")], 200)] == [100, 200]
    clock.stamp([], 300)
    assert clock.stamp([("a", "x")], 400)[0].since_unix_ms == 400
