"""Messages on jobs and nodes for people. All values come from the state and from the nodes' own reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gradstream.coordinator.jobs import decisions
from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.jobs.commits import counted_text
from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.jobs.plan_making import waits_for_nodes
from gradstream.coordinator.jobs.residuals import standing
from gradstream.coordinator.jobs.stalls import seconds_to_commit, step_seconds
from gradstream.coordinator.nodes.membership import SERVER, WORKER, NodeEntry
from gradstream.coordinator.state.state import JobRecord, StateReader, StepTotals
from gradstream.coordinator.telemetry.counts import codec_name
from gradstream.coordinator.telemetry.step_times import breakdown
from gradstream.coordinator.timing import judge_wait, unix_ms
from gradstream.core.job_states import PAUSED, PLANNING, QUEUED, RUNNING, STATE_WORDS
from gradstream.core.plan.leases import SLOTS, slots_text
from gradstream.core.plan.plan import Plan, Server
from gradstream.core.recipe.recipe import CodecConfig, Recipe
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, plan_pb2


@dataclass(frozen=True)
class StoredJob:
    """What the state has of a job for people."""

    record: JobRecord
    recipe: Recipe
    totals: StepTotals
    # The first and the last complete validation pass.
    validations: tuple[jobs_pb2.Validation, jobs_pb2.Validation] | None
    plan: plan_pb2.Plan | None


def read_stored_job(reader: StateReader, record: JobRecord, whole: bool = False) -> StoredJob:
    """Read a job. Only `whole` reads the plan of a job without a pipeline: a large model's plan has megabytes."""
    recipe = _recipe_of(record.recipe_json)
    wanted = whole or recipe.pipeline.stages != 1
    plan = reader.load_plan(record.job_id, record.epoch) if wanted else None
    return StoredJob(
        record,
        recipe,
        reader.step_totals(record.job_id, record.epoch, record.start_version),
        reader.first_and_last_validation(record.job_id),
        plan_pb2.Plan.FromString(plan) if plan is not None else None,
    )


@lru_cache(maxsize=256)
def _recipe_of(recipe_json: str) -> Recipe:
    """A stored recipe. Lists of jobs need the same ones again and again, and to validate one takes 70 us."""
    return Recipe.model_validate_json(recipe_json)


class Views:
    """Makes the messages of JobsService."""

    def __init__(self, controller: Controller):
        self._controller = controller
        self._state = controller.state
        controller.after_reconcile.append(self._keep_time)

    def job(self, record: JobRecord) -> jobs_pb2.Job:
        """One job, read from the state now: its state, progress and waits."""
        return self.from_stored(read_stored_job(self._state, record))

    def from_stored(self, stored: StoredJob, whole: bool = False) -> jobs_pb2.Job:
        """One job from what the state has of it, and for the active job from memory. `whole` adds workers' step times.

        A list of jobs leaves these out.
        """
        record, totals, recipe, plan = stored.record, stored.totals, stored.recipe, stored.plan
        active = self._controller.active
        if active is not None and active.job_id == record.job_id:
            record, totals, recipe, plan = active.record, active.totals, active.recipe, active.plan_message
        else:
            active = None
        message = jobs_pb2.Job(
            job_id=record.job_id,
            name=record.name,
            state=record.state,
            reason=record.reason,
            epoch=record.epoch,
            version=totals.version,
            step=recipe.rounds.steps_at(totals.version),
            num_steps=recipe.training.num_steps,
            num_tokens=totals.num_tokens,
            num_samples=totals.num_samples,
            num_skipped=totals.num_skipped,
            submitted_unix_ms=record.submitted_unix_ms,
            ended_unix_ms=record.ended_unix_ms,
            run_directory=record.run_directory,
            recipe_json=record.recipe_json,
            decisions=list(record.decisions.values()),
        )
        if totals.last is not None:
            message.loss = totals.last.loss
            message.codecs = codecs_line(recipe.codec, totals.last)
        hidden_share = self._controller.timelines.share(record.job_id)
        if hidden_share is not None:
            message.hidden_share = hidden_share
        if plan is not None:
            message.num_parameters = sum(math.prod(tensor.shape) for tensor in plan.tensors)
        steps = self._controller.timelines.steps(record.job_id)
        names = [server.name for server in plan.servers] if plan is not None else []
        if (
            steps is not None
            and (found := breakdown(steps, recipe.codec, recipe.training.num_slots, names, recipe.local)) is not None
        ):
            message.step_breakdown.CopyFrom(found)
            if not whole:
                message.step_breakdown.ClearField("workers")
        if plan is not None and plan.stage_ends:
            message.pipeline.CopyFrom(self._pipeline(record.job_id, plan))
        if stored.validations is not None:
            first, last = stored.validations
            message.initial_validation_loss, message.validation_loss = first.loss, last.loss
        if active is not None:
            self._add_live(message, active)
        elif record.state == QUEUED:
            message.waits.extend([*self._troubles(), self._turn(record)])
        return message

    def _pipeline(self, job_id: str, plan: plan_pb2.Plan) -> jobs_pb2.Pipeline:
        """A plan's pipeline and its bubble, measured and ideal.

        The ideal bubble is computed for the measured runs. Their number of microbatches depends on the slots that a
        replica held at that time.
        """
        num_stages = len(plan.stage_ends)
        message = jobs_pb2.Pipeline(
            num_stages=num_stages, num_workers=num_stages // max(1, plan.num_chunks), schedule=plan.pipeline_schedule
        )
        bubble = self._controller.timelines.bubble(job_id)
        if bubble is not None:
            message.bubble, message.ideal_bubble = bubble
        return message

    def _add_live(self, message: jobs_pb2.Job, active: ActiveJob) -> None:
        now = self._controller.clock()
        message.waits.extend(self.waits(active))
        if active.plan is None:
            return
        message.reason = self._reason(active, now)
        name_of = self._controller.members.name_of
        if active.round_line and active.state == RUNNING:
            message.decisions.append(active.round_line)
        message.slot_holders.extend(name_of(holder) if holder else "" for holder in active.holders)
        message.server_memory.extend(self._memory(active, active.plan))
        counted = counted_text([report for report, _ in active.pace.steps], len(active.holders), active.rounds)
        message.decisions.extend([counted] if counted else [])
        if active.state != RUNNING:
            return
        steps, tokens, pushed = active.pace.per_second(now, active.rounds)
        message.tokens_per_second, message.push_bytes_per_second = tokens, pushed
        message.pull_bytes_per_second = sum(
            node.sent_bytes_per_second(active.job_id) for node in self._controller.members.present(SERVER)
        )
        if steps > 0:
            message.eta_seconds = max(0, active.rounds.num_steps - message.step) / steps

    def _reason(self, active: ActiveJob, now: float) -> str:
        """The reason shown for a job's state: an order under way, a late step, or the cause of its last transition."""
        can_end_step = self._controller.leasing.can_end_step(active, now)
        settled, left = self._controller.servers.settled(active), seconds_to_commit(active, now)
        order = decisions.order_text(active.sight(can_end_step, settled, left))
        if order or active.state != RUNNING:
            return order or active.record.reason
        late, reason = self._judge_wait(active, self._idle_seconds(active, now))
        return reason if late else active.record.reason

    def _idle_seconds(self, active: ActiveJob, now: float) -> float:
        """Seconds without progress of the job. In a round each microbatch is progress: a round may take minutes."""
        at = active.progress_at
        if active.rounds.is_round(active.version):
            nodes = [self._controller.members.get(worker) for worker in active.members]
            at = max([at, *(node.progress_at for node in nodes if node is not None)])
        return now - at

    @staticmethod
    def _judge_wait(active: ActiveJob, idle_seconds: float) -> tuple[bool, str]:
        step = "round" if active.rounds.is_round(active.version) else "step"
        return judge_wait(idle_seconds, step_seconds(active), step)

    def _memory(self, active: ActiveJob, plan: Plan) -> Iterator[jobs_pb2.ServerMemory]:
        """The memory that each server reports for the job; servers that have not loaded the job are left out."""
        for index, server in enumerate(plan.servers):
            node = self._controller.members.get(server.node_id)
            if node is None or node.activity.job_id != active.job_id or not node.activity.num_parameters:
                continue
            activity, predicted = node.activity, active.predicted_bytes[index]
            yield jobs_pb2.ServerMemory(
                name=server.name,
                num_parameters=activity.num_parameters,
                state_bytes=activity.state_bytes,
                predicted_state_bytes=predicted.state,
                early_bytes=activity.early_bytes,
                most_early_bytes=predicted.early,
                newcomer_bytes=activity.newcomer_bytes,
                max_newcomer_bytes=predicted.newcomer,
            )

    def _turn(self, record: JobRecord) -> jobs_pb2.Wait:
        active = self._controller.active
        if active is not None:
            whom = f"job {active.job_id}, which is {STATE_WORDS[active.state]}"
        else:
            whom = "the jobs queued before it"
        return jobs_pb2.Wait(what="its turn", whom=whom, since_unix_ms=record.submitted_unix_ms)

    def _keep_time(self, active: ActiveJob) -> None:
        """Update the waits at every reconcile, so that their "since" does not depend on when a person asks."""
        self.waits(active)

    # --- waits ------------------------------------------------------------------------------------------------------

    def waits(self, active: ActiveJob) -> list[jobs_pb2.Wait]:
        """The waits of the active job, with the time at which each began."""
        own = active.waits.stamp(self._waits_for(active), unix_ms())
        return [*self._troubles(), *self._retries(active), *own, *self._nodes_waits(active)]

    def _troubles(self) -> list[jobs_pb2.Wait]:
        """Why the coordinator cannot store its state, and since when."""
        troubles = [trouble for trouble in (self._controller.retry.trouble, self._state.trouble) if trouble is not None]
        if not troubles:
            return []
        since = min(trouble.since_unix_ms for trouble in troubles)
        return [jobs_pb2.Wait(what=troubles[0].cause, whom="the coordinator", since_unix_ms=since)]

    def _retries(self, active: ActiveJob) -> Iterator[jobs_pb2.Wait]:
        """The wait for another attempt to make the job's plan, if the last one failed."""
        trouble = active.planning.retry.trouble
        if trouble is not None:
            yield jobs_pb2.Wait(what=trouble.cause, whom="the coordinator", since_unix_ms=trouble.since_unix_ms)

    def _waits_for(self, active: ActiveJob) -> list[tuple[str, str]]:
        benched = [
            (f"{bench.title}, which is benched: {bench.reason}", bench.title) for bench in active.benches.current()
        ]
        if active.state == PLANNING:
            return [*self._planning_waits(active), *benched]
        if active.plan is None:
            return []
        waits = self._silent_servers(active)
        if active.state == PAUSED:
            if active.snapshot_due is not None:
                waits.append(self._checkpoint_wait(active, active.snapshot_due))
            if active.record.desired == "pause":
                waits.append((f"`gradstream resume {active.record.job_id}`", "a person"))
            return waits
        free = [slot for slot, holder in enumerate(active.holders) if not holder and not active.resting]
        if free:
            lacking = active.lease_reason.partition("no replica: ")[2]
            whom = f"a replica for {slots_text(free)} ({lacking})" if lacking else ""
            waits.append((whom or f"a worker for {slots_text(free)}", "a worker to register"))
            waits.extend(benched)
        leader = active.plan.servers[active.plan.leader].name
        done = active.done
        if active.record.desired != "run" and not active.resting and not done and active.snapshot_due is None:
            waits.append(
                (f"the end of {active.rounds.commit_text(active.version)}, to {active.record.desired} there", leader)
            )
        boundary = active.halted_version if active.halted_version is not None else active.version if done else None
        boundary = active.snapshot_due if boundary is None else boundary
        if boundary is not None and boundary not in active.checkpoints:
            waits.append(self._checkpoint_wait(active, boundary))
        if done and not active.fully_validated:
            waits.append(self._validation_wait(active))
        return waits

    def _planning_waits(self, active: ActiveJob) -> list[tuple[str, str]]:
        """The waits of a job in planning, as (what, whom)."""
        if active.record.desired in ("pause", "stop"):
            return self._silent_servers(active)
        if waits_for_nodes(active, self._controller.clock()):
            return [("all nodes to come back after the coordinator's restart", "the nodes")]
        if active.planning.hold.cause:
            return [(active.planning.hold.cause, "the operator of the storage")]
        if active.planning.task is not None:
            return [("the plan to be made", "the coordinator")]
        nodes = self._controller.plan_making.nodes(active)
        if nodes.ids == active.planning.refusal.nodes:
            return [(f"nodes that can hold the job: {active.planning.refusal.reason}", "a node to register")]
        missing = decisions.missing_nodes(active.recipe, len(nodes.servers), len(nodes.workers), active.need_workers)
        return [*missing, *self._silent_servers(active)]

    def _silent_servers(self, active: ActiveJob) -> list[tuple[str, str]]:
        """The waits for the state of silent servers, with the maximum time."""
        if active.plan is None:
            return []
        seconds = self._controller.timing.reunion_seconds
        cure = "; `gradstream stop --now` gives it up" if active.record.desired == "stop" else ""
        waits = []
        for server in active.plan.servers:
            absence = active.reunion.absences.get(server.node_id)
            if absence is None or absence.refuses:
                continue
            if active.reunion.company_since is None:
                fate = "silent; the job waits for its state as long as no server can be reached"
            else:
                fate = f"silent; the job waits for its state, {seconds:g} s at most"
            waits.append((f"parameter server {server.name} to come back ({fate}{cure})", server.name))
        return waits

    def _checkpoint_wait(self, active: ActiveJob, version: int) -> tuple[str, str]:
        assert active.plan is not None
        reported = active.files.get(version, {})
        late = [self._with_cause(s) for index, s in enumerate(active.plan.servers) if index not in reported]
        owed = standing(active, version, self._controller.members, self._controller.clock()).owed
        late += sorted({self._controller.members.name_of(holder) for holder in owed.values() if holder})
        place = active.rounds.version_text(version)
        if version in active.unwritten:
            return f"the checkpoint of {place}: {active.unwritten[version][1]}", "the storage to be repaired"
        return f"the checkpoint of {place}", ", ".join(late) or "the coordinator, to write its manifest"

    def _with_cause(self, server: Server) -> str:
        """A server's name and, if it reports that it waits for its disk, the cause."""
        node = self._controller.members.get(server.node_id)
        cause = node.activity.waiting_for if node is not None else ""
        return f"{server.name}: it waits for {cause}" if cause.startswith("the disk") else server.name

    def _validation_wait(self, active: ActiveJob) -> tuple[str, str]:
        parts = self._state.validation_parts(active.job_id, active.rounds.last_version)
        late = [slot for slot in range(len(active.holders)) if slot not in parts]
        return f"the last validation pass, {slots_text(late)}", self._holders_of(active, late)

    def _holders_of(self, active: ActiveJob, slots: Sequence[int]) -> str:
        holders = [active.holders[slot] for slot in slots if slot < len(active.holders)]
        names = {self._controller.members.name_of(holder) for holder in holders if holder}
        return ", ".join(sorted(names)) or "a worker to register"

    def _nodes_waits(self, active: ActiveJob) -> list[jobs_pb2.Wait]:
        """The waits that the job's nodes report themselves, shown when a step is late."""
        idle_seconds = self._idle_seconds(active, self._controller.clock())
        if active.state != RUNNING or not self._judge_wait(active, idle_seconds)[0]:
            return []
        waits = []
        for node in [*self._servers_of(active), *self._controller.members.present(WORKER)]:
            activity = node.activity
            if activity.job_id != active.job_id:
                continue
            since = activity.waiting_since_unix_ms or unix_ms() - int(idle_seconds * 1000)
            if activity.missing_slots:
                slots = list(activity.missing_slots)[: len(active.holders)]
                what = (
                    f"contributions of {slots_text(slots)} to {active.rounds.commit_text(activity.step)} at {node.name}"
                )
                waits.append(jobs_pb2.Wait(what=what, whom=self._holders_of(active, slots), since_unix_ms=since))
            elif activity.waiting_for == SLOTS:
                continue  # it holds up no step
            elif activity.waiting_for:
                waits.append(
                    jobs_pb2.Wait(what=activity.waiting_for, whom=f"asked by {node.name}", since_unix_ms=since)
                )
            elif activity.phase not in ("", "idle", "waiting"):
                what = f"{active.rounds.commit_text(activity.step)}: {activity.phase} {activity.detail}".rstrip()
                waits.append(jobs_pb2.Wait(what=what, whom=node.name, since_unix_ms=since))
        return waits

    def _servers_of(self, active: ActiveJob) -> list[NodeEntry]:
        servers = active.plan.servers if active.plan is not None else ()
        nodes = [self._controller.members.get(server.node_id) for server in servers]
        return [node for node in nodes if node is not None and node.present]

    # --- nodes ------------------------------------------------------------------------------------------------------

    def node(self, node: NodeEntry) -> jobs_pb2.Node:
        """One node."""
        return jobs_pb2.Node(
            node_id=node.node_id,
            name=node.name,
            kind=node.kind,
            address=node.address,
            alive=node.alive,
            last_heartbeat_unix_ms=node.last_heartbeat_unix_ms,
            activity=node.activity,
            memory_bytes=node.memory_bytes,
            device=node.device,
            flops_per_second=node.flops_per_second,
            vitals=node.vitals,
        )

    def refused_nodes(self) -> list[jobs_pb2.RefusedNode]:
        """Nodes whose registration was refused."""
        return self._controller.members.refused()


def codecs_line(codec: CodecConfig, last: coordinator_pb2.ReportStepRequest) -> str:
    """The codecs of a step for people, with the reason if they were chosen automatically."""
    push, chosen = codec_name(last.push_codec), codec_name(last.pull_codec)
    pull = f"delta-{chosen}" if codec.pull == "auto" else codec.pull
    reason = f" (auto: {last.codec_reason})" if last.codec_reason else ""
    return f"push {push}, pull {pull}{reason}"
