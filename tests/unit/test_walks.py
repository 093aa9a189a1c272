"""Two paths through the code, hop by hop: a gradient's and a submitted job's. docs/architecture.md names the files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER, CORE, CLIENT = "worker/gradstream/worker", "core/gradstream/core", "client/gradstream/client"
SERVER = "services/gradstream/services/parameter_server"
COORDINATOR = "coordinator/gradstream/coordinator"

# File, what is defined there, and what of it leads on to the next.
GRADIENT = [
    (f"{WORKER}/compute.py", "_LastPass.emit", "self._emit("),
    (f"{WORKER}/push.py", "SlotEmit.__call__", "self._encode("),
    (f"{WORKER}/push.py", "Pusher._encode", ".put"),
    (f"{WORKER}/push.py", "PushStream._sending", "frames("),
    (f"{CORE}/wire/frames.py", "frames", "frame("),
    (f"{SERVER}/servicer.py", "ParameterServerServicer._take", ".check("),
    (f"{SERVER}/servicer.py", "ParameterServerServicer._take", "verify("),
    (f"{SERVER}/servicer.py", "ParameterServerServicer._take", ".offer("),
    (f"{SERVER}/shard.py", "Shard.offer", "self.accumulation.offer("),
    (f"{SERVER}/accumulation.py", "Accumulation.add", "state.add,"),
    (f"{SERVER}/bundle_state.py", "BundleState.add", "codec.add("),
    (f"{SERVER}/shard.py", "Shard._commit", "commit.completion("),
    (f"{SERVER}/leader.py", "Leader.complete", "self._decide("),
    (f"{SERVER}/commit.py", "decide", "decide_commit("),
    (f"{SERVER}/commit.py", "apply", "state.apply("),
    (f"{SERVER}/bundle_state.py", "BundleState.publish", "self._publisher.publish("),
    (f"{WORKER}/pull.py", "Puller", "Pull("),
    (f"{WORKER}/weights.py", "WeightInstaller._decode", "self._put_in_place("),
]
SUBMIT = [
    (f"{CLIENT}/_async_client.py", "AsyncClient.submit", "stub.SubmitJob("),
    (f"{COORDINATOR}/servicers/jobs.py", "JobsServicer.SubmitJob", "self._submissions.submit("),
    (f"{COORDINATOR}/servicers/submissions.py", "Submissions._submit", "self._controller.submit("),
    (f"{COORDINATOR}/jobs/controller.py", "Controller.submit", "self.journal.create("),
    (f"{COORDINATOR}/jobs/journal.py", "Journal.create", "self._state."),
    (f"{COORDINATOR}/jobs/controller.py", "Controller._make_plan", "self.plan_making."),
    (f"{COORDINATOR}/jobs/plan_making.py", "make_plan", "planner.make_plan"),
    (f"{COORDINATOR}/planning/planner.py", "make_plan", "Plan("),
    (f"{COORDINATOR}/jobs/leasing.py", "Leasing", "decisions."),
    (f"{WORKER}/process.py", "Worker", "Plan.from_proto("),
    (f"{WORKER}/job.py", "WorkerJob", "Pusher("),
]


def definition(path: Path, name: str) -> str:
    """The source of a class, a function or a method of a file."""
    source = path.read_text("utf-8")
    body: list[ast.stmt] = ast.parse(source).body
    found: ast.stmt | None = None
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = next((node for node in body if isinstance(node, kinds) and node.name == part), None)
        assert found is not None, f"{path.name} does not define {name}"
        body = getattr(found, "body", [])
    return ast.get_source_segment(source, found) or "" if found is not None else ""


@pytest.mark.parametrize(("file", "name", "leads_on"), [*GRADIENT, *SUBMIT])
def test_each_hop_leads_on(file: str, name: str, leads_on: str) -> None:
    assert leads_on in definition(ROOT / file, name)


@pytest.mark.parametrize(("walk", "title"), [(GRADIENT, "### A gradient"), (SUBMIT, "### A submitted job")])
def test_architecture_names_the_files_in_this_order(walk: list[tuple[str, str, str]], title: str) -> None:
    section = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition(f"\n{title}\n")[2].partition("\n#")[0]
    at = -1
    for file in dict.fromkeys(file for file, _, _ in walk):
        place = section.find(f"`{file}`")
        assert place > at, f"{file} is not there, or not in its place"
        at = place
