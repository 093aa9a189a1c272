"""The life of nodes and jobs: compares what is with what should be, and makes the transitions in between.

`reconcile` is level-triggered: it reads the membership, the active job and the clock, and makes every transition that
is due, whatever event called for it. So nothing depends on the order of events, after a restart the same code goes on,
and a transition that could not be stored is due again. All of it runs on the event loop; only planning and manifests
run in threads.

queued → planning → running ⇄ paused → finished | failed | stopped; a lost server leads from running back to planning.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gradstream.coordinator.jobs import checkpoints, plan_making, stalls
from gradstream.coordinator.jobs import decisions as scheduler
from gradstream.coordinator.jobs.active import ActiveJob, nothing
from gradstream.coordinator.jobs.boundaries import Boundaries
from gradstream.coordinator.jobs.decisions import Ending
from gradstream.coordinator.jobs.journal import Event, Journal, Retry
from gradstream.coordinator.jobs.leasing import Leasing
from gradstream.coordinator.jobs.plan_making import MadePlan
from gradstream.coordinator.jobs.server_watch import ServerWatch
from gradstream.coordinator.nodes.benches import find_stuck, stuck_workers
from gradstream.coordinator.nodes.membership import SERVER, WORKER, Membership, NodeEntry
from gradstream.coordinator.nodes.reunion import Verdict
from gradstream.coordinator.nodes.sessions import Hub, Session
from gradstream.coordinator.nodes.storage_checks import StorageChecks
from gradstream.coordinator.planning.needs import human_bytes
from gradstream.coordinator.state.notify import Notifier
from gradstream.coordinator.state.state import JobRecord, State
from gradstream.coordinator.telemetry.timelines import Timelines
from gradstream.coordinator.timing import Timing, unix_ms
from gradstream.core.errors import GradstreamError, PlanError, UnreachableError, one_line
from gradstream.core.log import get_logger
from gradstream.core.rpc.access import by_caller
from gradstream.core.storage.pool import LOAD_SECONDS, StorageThreads
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, plan_pb2

QUEUED, PLANNING, RUNNING, PAUSED, FINISHED, FAILED, STOPPED = (
    jobs_pb2.JOB_STATE_QUEUED,
    jobs_pb2.JOB_STATE_PLANNING,
    jobs_pb2.JOB_STATE_RUNNING,
    jobs_pb2.JOB_STATE_PAUSED,
    jobs_pb2.JOB_STATE_FINISHED,
    jobs_pb2.JOB_STATE_FAILED,
    jobs_pb2.JOB_STATE_STOPPED,
)
HOLD_SECONDS = 2.0
"""Between looks at a storage that does not show what it should."""
__all__ = ["Controller", "Timing", "unix_ms"]

log = get_logger()


class Controller:
    """Owns the membership, the sessions and the active job."""

    def __init__(self, state: State, timing: Timing | None = None, clock: Callable[[], float] = time.monotonic):
        self.timing = timing if timing is not None else Timing()
        self.state = state
        self.clock = clock
        self.members = Membership(self.timing.heartbeat_seconds, self.timing.lease_seconds)
        self.notifier = Notifier(state)
        self.journal = Journal(state, self.notifier)
        self.leasing = Leasing(self.members)
        self.servers = ServerWatch(self.members, self.timing, self.reconcile)
        self.timelines = Timelines()
        self.active: ActiveJob | None = None
        # Checkpoints that retention leaves alone.
        self.pins = checkpoints.Pins()
        # Called at the end of each reconcile with the active job, for what others derive from it.
        self.after_reconcile: list[Callable[[ActiveJob], None]] = []
        # Why the last look could not make its transitions, and when the next one comes.
        self.retry = Retry(self.timing.retry_seconds)
        self._closing = False
        self._hub = Hub()
        self.boundaries = Boundaries(self.members, self.leasing, self._hub.send)
        self.storage = StorageChecks(self._hub.send)
        # Reads and writes checkpoints, wherever jobs have them.
        self.disk = StorageThreads(LOAD_SECONDS)
        self._looked_at = clock()
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up what the state holds and begin to watch the clock."""
        for record in self.state.list_jobs():
            if record.state in (PLANNING, RUNNING) or (record.state == PAUSED and record.plan_held):
                await self._adopt(record)
        self._loop_task = asyncio.create_task(self._watch_clock())

    async def _adopt(self, record: JobRecord) -> None:
        """Go on with a job that another coordinator had under way."""
        if self.active is not None:
            # Written by a version that could leave two jobs under way.
            self.journal.store(record, [Event("state", "queued again")], state=QUEUED, reason="waits for its turn")
            return
        active = self._load(record)
        if active is None:
            return
        root = checkpoints.root_of(record.run_directory)
        try:
            active.checkpoints.update(await self.disk.call(root, checkpoints.versions_on_disk, root))
        except (UnreachableError, OSError) as error:
            # It must not keep the coordinator from its other jobs. What was acknowledged was there.
            active.checkpoints.update(self.state.checkpoint_versions(record.job_id))
            log.warning("the checkpoints of a job cannot be listed", job=record.job_id, cause=one_line(error))
        if active.plan is not None and active.plan.checkpoint_path:
            active.release_start = self.pins.pin(root, record.start_version)
        last = active.totals.last
        if last is not None and last.halted and last.epoch == record.epoch:
            if record.desired == "run":
                # The halt was taken back; its workers rest until they hear of a newer table.
                active.leases_due = True
            else:
                active.halted_version = last.step + 1
        now = self.clock()
        active.progress_at = now
        active.expect_holders_until = now + self.timing.adopt_grace_seconds
        self.active = active
        word = scheduler.STATE_WORDS[record.state]
        self.journal.note(record.job_id, "state", f"the coordinator was restarted and found the job {word}")

    async def stop(self, grace_seconds: float = 0.0) -> None:
        """Stop deciding; a manifest that is being written has so long to be done. Nodes stay as they are."""
        self._closing = True
        active = self.active
        if active is not None and active.writing is not None:
            await asyncio.wait([active.writing], timeout=grace_seconds)
        await self.servers.stop()
        work = [active.planning, active.writing] if active is not None else []
        for task in [self._loop_task, *work]:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._hub.end_all()

    async def _watch_clock(self) -> None:
        while True:
            self.reconcile()
            await asyncio.sleep(self.timing.tick_seconds)

    # --- nodes ------------------------------------------------------------------------------------------------------

    def register(self, request: coordinator_pb2.RegisterRequest) -> NodeEntry:
        """Enter a node that was checked. Raises ConfigError when another live process has its name, BusyError while
        that is not known."""
        now = self.clock()
        self.servers.keep_name(self.active, request, now)
        node = self.members.register(request, now, unix_ms())
        log.info("registered", node=node.node_id, address=node.address, holds=dict(node.holds))
        return node

    def open_session(self, node_id: str) -> Session | None:
        """Begin a node's stream and queue what it must know; None when the node is not registered."""
        node = self.members.open_session(node_id)
        if node is None:
            return None
        session = self._hub.open(node)
        active = self.active
        for job_id, epoch in list(node.holds.items()):
            if active is None or active.plan is None or (active.job_id, active.record.epoch) != (job_id, epoch):
                self._hub.release(node, job_id, "the coordinator has no such job running under this epoch")
        if active is not None:
            self._note_node(f"{node.title} is here ({node.device})")
            if active.plan is not None and active.state in (RUNNING, PAUSED) and node.kind == WORKER:
                self._send_plan(node, active)
                if node not in self.leasing.workers(active):
                    has = human_bytes(node.memory_bytes)
                    self._note_node(f"{node.title} offers {has}, too little for this model: no slots")
        number = active.lease_number if active is not None else 0
        self.reconcile()
        under_way = active is not None and self.active is active and active.state in (RUNNING, PAUSED)
        if node.kind == WORKER and active is not None and under_way:
            # A table that is yet to be stored is sent when it is; one that was just sent is not sent twice.
            stands = not active.leases_due and active.lease_number == number and active.job_id in node.holds
            if stands:
                self._hub.send(node, coordinator_pb2.SessionResponse(leases=self.leasing.standing_table(active)))
        return session

    def heartbeat(self, session: Session, activity: coordinator_pb2.Activity) -> bool:
        """Renew a node's lease; False when the stream has been superseded."""
        return self.members.heartbeat(session.node_id, session.number, activity, self.clock(), unix_ms())

    def note_vitals(self, session: Session, vitals: coordinator_pb2.Vitals) -> None:
        """Keep what a node tells of itself."""
        self.members.note_vitals(session.node_id, vitals)

    def close_session(self, session: Session, why: str) -> None:
        """A stream has ended; its node is silent at once unless it has another by now."""
        self._hub.close(session, why)
        node = self.members.close_session(session.node_id, session.number)
        if node is not None and not self._closing:
            self._note_node(f"{node.title} is gone: {why}")
            self.reconcile()

    def _send_plan(self, node: NodeEntry, active: ActiveJob) -> None:
        if node.holds.get(active.job_id) == active.record.epoch or active.benches.failed(node.node_id):
            return
        self._hub.send(node, coordinator_pb2.SessionResponse(plan=active.plan_message))
        node.holds[active.job_id] = active.record.epoch

    def _note_node(self, message: str) -> None:
        if self.active is None:
            log.info(message)
        else:
            self.journal.note(self.active.job_id, "node", message)

    # --- orders and reports -----------------------------------------------------------------------------------------

    def submit(self, record: JobRecord, warnings: Sequence[str] = ()) -> None:
        """Queue a new job, with what its recipe likely does not mean. Raises UnreachableError."""
        submitted = Event("submitted", f"submitted{by_caller()}; files in {record.run_directory}")
        self.journal.create(record, [submitted, *(Event("warning", warning) for warning in warnings)])
        self.reconcile()

    def fail(self, job_id: str, reason: str) -> None:
        """End the active job as failed. Raises UnreachableError."""
        active = self.active
        if active is not None and active.job_id == job_id:
            self.end(active, FAILED, reason)
        self.reconcile()

    def node_failed(self, active: ActiveJob, node: NodeEntry, message: str) -> None:
        """Bench a node that cannot go on; the job fails when no other node of its kind can. Raises UnreachableError."""
        now = self.clock()
        active.benches.bench(node.node_id, node.title, message, True, now)
        if node.kind == SERVER:
            active.reunion.failures[node.node_id] = message
            others = bool(self._usable_servers(active))
        else:
            # It has dropped the job, and starts over with the plan once it is benched no more.
            node.holds.pop(active.job_id, None)
            others = bool(self.leasing.candidates(active, now))
        if others:
            self._note_node(f"{node.title} is benched for this job: {message}")
        elif node.kind == SERVER or active.plan is None:
            self.fail(active.job_id, active.benches.failures())
        else:
            # The servers still hold the state.
            active.failing = active.benches.failures()
            self._note_node(f"{node.title} cannot go on, nor can another worker: {message}")
        self.reconcile()

    def _usable_servers(self, active: ActiveJob) -> list[NodeEntry]:
        return [node for node in self.members.present(SERVER) if not active.benches.failed(node.node_id)]

    # --- reconciliation ---------------------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Make every transition that is due. Never raises: what failed is tried again, at growing intervals."""
        if self._closing:
            return
        now = self.clock()
        self._forgive_own_stall(now)
        for node in self.members.expire(now):
            self._hub.end(node.node_id, "its lease ran out")
            self._note_node(f"{node.title} is gone: no heartbeat for {self.timing.lease_seconds:g} s")
        if not self.retry.due(now):
            return
        try:
            if self.active is None:
                self._start_next()
            if self.active is not None:
                self._advance(self.active, now)
            if self.active is None:
                self._start_next()
            for follow_up in self.after_reconcile:
                if self.active is not None:
                    follow_up(self.active)
            self.retry.succeeded()
        except GradstreamError as error:
            if self.retry.failed(one_line(error), now):
                log.error("could not act; trying again", cause=one_line(error))
        except Exception as error:
            if self.retry.failed(one_line(error), now):
                log.exception("could not act; trying again")

    def _forgive_own_stall(self, now: float) -> None:
        """When this process itself stood still (a large import, a suspended machine), nobody else is to blame."""
        stall = now - self._looked_at - self.timing.tick_seconds
        self._looked_at = now
        if stall > self.timing.heartbeat_seconds:
            self.members.forgive(stall, now)
            if self.active is not None:
                self.active.reunion.forgive(stall)

    def _load(self, record: JobRecord) -> ActiveJob | None:
        """The view of a job; None when its record cannot be read any more, which ends it."""
        try:
            active = ActiveJob.load(record, self.state)
        except UnreachableError:
            raise
        except GradstreamError as error:
            reason = f"its record cannot be used: {one_line(error)}; submit it again"
            event = Event("failure", f"failed: {reason}")
            self.journal.store(record, [event], state=FAILED, reason=reason, plan_held=False, ended_unix_ms=unix_ms())
            return None
        active.reunion.reunion_seconds = self.timing.reunion_seconds
        active.benches.bench_seconds = self.timing.bench_seconds
        return active

    def _start_next(self) -> None:
        while self.active is None and self.journal.jobs_changed:
            record = scheduler.next_job(self.state.list_jobs())
            if record is None:
                self.journal.jobs_changed = False
                return
            # What an earlier turn left on nodes was released.
            changes: dict[str, Any] = {"state": PLANNING, "reason": "its turn has come", "plan_held": False}
            active = self._load(replace(record, plan_held=False))
            if active is None:
                continue
            self.update(active, Event("state", "planning: its turn has come"), **changes)
            active.progress_at = self.clock()
            self.active = active
            self._advance(active, self.clock())

    def _advance(self, active: ActiveJob, now: float) -> None:
        for bench in active.benches.lift(now, lambda node, since: stalls.has_recovered(self.members.get(node), since)):
            self._note_node(f"{bench.title} is tried again, after: {bench.reason}")
        if active.failing and self.leasing.candidates(active, now):
            active.failing = ""
        steps: list[Callable[[ActiveJob, float], None]] = [
            self._judge_servers,
            self._judge_end,
            self._judge_workers,
            self._lease,
            self.boundaries.ask_for_boundary,
        ]
        if active.state in (RUNNING, PAUSED) and active.plan is None:
            self.set_state(active, PLANNING, "its plan is lost")
        if active.state == PLANNING:
            self._advance_plan(active, now)
        for step in steps:
            if active.state in (RUNNING, PAUSED) and self.active is active:
                step(active, now)

    # --- planning ---------------------------------------------------------------------------------------------------

    def _advance_plan(self, active: ActiveJob, now: float) -> None:
        desired = active.record.desired
        if self._plan_stands(active, now):
            return  # for a stop and a pause too: the servers write a checkpoint of what they hold
        if active.failing:
            self.end(active, FAILED, active.failing)
        elif desired == "stop":
            self.end(active, STOPPED, f"stopped at version {active.version} while planning{self.unsaved(active)}")
        elif desired == "pause":
            self._leave(active, PAUSED, "paused while planning")
        elif active.planning is None and now >= active.held_until:
            if not active.planning_retry.due(now):
                return
            servers, workers = self.plannable(active)
            if frozenset(node.node_id for node in (*servers, *workers)) == active.refused_nodes:
                return
            if not scheduler.missing_nodes(active.recipe, len(servers), len(workers), active.need_workers):
                active.planning = asyncio.create_task(self._make_plan(active, servers, workers))

    def plannable(self, active: ActiveJob) -> tuple[list[NodeEntry], list[NodeEntry]]:
        """The servers and the workers that a plan can be made with now."""
        workers = [node for node in self.members.present(WORKER) if not active.benches.failed(node.node_id)]
        return self._usable_servers(active), workers

    def _plan_stands(self, active: ActiveJob, now: float) -> bool:
        """Whether the plan that a job in planning had is still to be hoped for, or in force again."""
        if active.plan is None:
            return False
        verdict, reason = self.servers.look(active, now)
        if verdict is Verdict.HOLD:
            self.set_state(active, RUNNING, "its servers came back with all of their state; no step is lost")
            active.leases_due = True
        elif verdict is Verdict.WAIT and reason != active.planning_reason:
            active.planning_reason = reason
            self._note_node(f"{reason}; its state is waited for before it is given up")
        return verdict is not Verdict.LOST

    async def _make_plan(self, active: ActiveJob, servers: list[NodeEntry], workers: list[NodeEntry]) -> None:
        record = active.record
        root = checkpoints.root_of(record.run_directory)
        cause, waits_for = "", f"{root} to be readable"
        release: Callable[[], None] = nothing
        try:
            start = await plan_making.choose_start(root, self.pins, self.disk)
            release, waits_for = start.release, "the plan to be stored"
            known = self.state.checkpoint_versions(record.job_id)
            if self._is_held(active, await plan_making.hindrance(active, start, known, servers, workers, self.storage)):
                return
            made = await plan_making.make_plan(active, servers, workers, start)
            wanted = self.active is active and active.state == PLANNING and active.record.desired == "run"
            now = self.clock()
            # What has happened meanwhile is judged again: servers may be back with all of their state, and one that
            # died must not be planned with. The next look starts over.
            if wanted and not self._plan_stands(active, now) and all(server.present for server in servers):
                self._take_plan(active, made)
                active.release_start()
                active.release_start, release = release, nothing
            active.planning_retry.succeeded()
        except PlanError as error:
            if record.epoch == 0:
                cause = self._fail_in_task(active, one_line(error))
            else:
                # The cluster held this job before: the nodes that are missing may be on their way back.
                active.refusal = one_line(error)
                active.refused_nodes = frozenset(node.node_id for node in (*servers, *workers))
        except UnreachableError as error:
            cause = f"{waits_for}: {one_line(error)}"
        except GradstreamError as error:
            cause = self._fail_in_task(active, one_line(error))
        except OSError as error:
            cause = f"{root} to be readable: {one_line(error)}"
        except Exception as error:
            log.exception("planning failed")
            cause = self._fail_in_task(active, f"the plan could not be made: {one_line(error)}")
        finally:
            active.planning = None
            release()
        if cause and active.planning_retry.failed(cause, self.clock()):
            log.error("no plan yet; trying again", job=active.job_id, cause=cause)
        self.reconcile()

    def _is_held(self, active: ActiveJob, why: str) -> bool:
        """Note what of the storage keeps the plan from being made, if anything, and when to look again."""
        if why and why != active.hold:
            self.journal.note(active.job_id, "plan", f"held: {why}")
        active.hold = why
        active.held_until = self.clock() + HOLD_SECONDS if why else 0.0
        return bool(why)

    def _fail_in_task(self, active: ActiveJob, reason: str) -> str:
        """Fail the job; return why that could not be stored, "" when it was."""
        try:
            self.fail(active.job_id, reason)
        except UnreachableError as error:
            return f"the failure to be stored ({reason}): {one_line(error)}"
        return ""

    def _take_plan(self, active: ActiveJob, made: MadePlan) -> None:
        """Make a plan the job's, durably first, then tell everyone."""
        plan, message = made.plan, made.plan.to_proto()
        old_epoch = active.record.epoch
        events = [Event("plan", made.message)]
        again = plan_making.recomputed(active.version, plan.start_version) if old_epoch else ""
        if again:
            events.append(Event("plan", again))
        totals = self.state.step_totals(active.job_id, plan.epoch, plan.start_version)
        self.update(
            active,
            *events,
            plan=message.SerializeToString(),
            state=RUNNING,
            reason=f"epoch {plan.epoch} from version {plan.start_version}",
            epoch=plan.epoch,
            start_version=plan.start_version,
            plan_held=True,
            decisions={**active.record.decisions, **made.reasons},
        )
        active.take_plan(message, plan)
        active.checkpoints = set(made.versions)
        active.totals = totals
        active.progress_at = self.clock()
        active.leases_due = True
        for node in self.members.everyone_present():
            if node.kind == WORKER or plan.server_index(node.node_id) is not None:
                self._send_plan(node, active)
            elif active.job_id in node.holds:
                self._hub.release(node, active.job_id, "the new plan does without it")

    # --- servers ----------------------------------------------------------------------------------------------------

    def _judge_servers(self, active: ActiveJob, now: float) -> None:
        verdict, reason = self.servers.look(active, now)
        if verdict is not Verdict.LOST:
            return
        event = Event("node", f"{reason}; the job goes back to its last checkpoint")
        if active.record.desired == "stop":
            self.end(active, STOPPED, f"stopped at version {active.version}{self.unsaved(active)}: {reason}", event)
        elif active.state == PAUSED or active.record.desired == "pause":
            # The cluster is free for the next job.
            self._leave(active, PAUSED, f"paused; {reason}, so it will go on from its last checkpoint", event)
        else:
            self.set_state(active, PLANNING, f"{reason}; going back to the last checkpoint", event)
            self._advance_plan(active, now)

    # --- endings ----------------------------------------------------------------------------------------------------

    def _judge_end(self, active: ActiveJob, now: float) -> None:
        skips = scheduler.judge_skips(active.totals, active.record.epoch, active.recipe)
        if skips:
            self.end(active, FAILED, skips)
            return
        ending, reason = scheduler.judge_end(self._sight(active, now))
        if ending is Ending.FINISH:
            self.end(active, FINISHED, reason)
        elif ending is Ending.STOP:
            self.end(active, STOPPED, reason)
        elif ending is Ending.FAIL:
            self.end(active, FAILED, reason)
        elif ending is Ending.PAUSE:
            self.set_state(active, PAUSED, reason)
        elif ending is Ending.SNAPSHOT:
            line = self.boundaries.ask_for_snapshot(active, now)
            if line:
                self.journal.note(active.job_id, "checkpoint", line)

    def _sight(self, active: ActiveJob, now: float) -> scheduler.JobSight:
        """How the active job looks to the decision where it goes."""
        return scheduler.JobSight(
            desired=active.record.desired,
            state=active.state,
            version=active.version,
            num_steps=active.num_steps,
            halted_version=active.halted_version,
            checkpoints=active.checkpoints,
            validated=active.fully_validated,
            any_worker=self.leasing.any_worker(active, now) and not self._all_stuck(active, now),
            early=active.early_ending,
            start_version=active.record.start_version,
            settled=self.servers.settled(active),
            failing=active.failing,
            checkpoint_awaited=active.checkpoint_awaited,
        )

    def _all_stuck(self, active: ActiveJob, now: float) -> bool:
        """Whether the step under way has no end because none of its workers gets anything done."""
        sights = stalls.worker_sights(active, self.members, now)
        stuck = stuck_workers(sights, stalls.slot_seconds(active), self.timing)
        return bool(stuck) and len(stuck) >= len(self.leasing.candidates(active, now))

    def unsaved(self, active: ActiveJob) -> str:
        """What a job that ends now leaves of its steps, as the end of a sentence; empty when all of them."""
        last = max(self.state.checkpoint_versions(active.job_id), default=0)
        if last >= active.version:
            return ""
        return f"; its last checkpoint is of version {last}" if last else "; it has no checkpoint"

    def pinned_versions(self, active: ActiveJob) -> set[int]:
        """The versions of the active job whose checkpoints stay, however old: those that a plan starts from or an
        export reads, those that may be a fine-tuning's result, and the bases of jobs that have not ended."""
        root = checkpoints.root_of(active.record.run_directory)
        bases = [
            base
            for record in self.state.list_jobs()
            if record.state not in scheduler.ENDED and (base := plan_making.base_path(record.recipe_json))
        ]
        return self.pins.of(root) | active.candidates | checkpoints.bases_under(root, bases)

    # --- leases -----------------------------------------------------------------------------------------------------

    def _judge_workers(self, active: ActiveJob, now: float) -> None:
        """Bench workers that heartbeat but get nothing done, or that cannot reach a peer: their slots move."""
        if active.resting:
            return
        sights = stalls.worker_sights(active, self.members, now)
        num_able = len(self.leasing.candidates(active, now))
        for node_id, reason in find_stuck(sights, num_able, stalls.slot_seconds(active), self.timing):
            node = self.members.get(node_id)
            if node is not None:
                active.benches.bench(node_id, node.title, reason, False, now)

    def _lease(self, active: ActiveJob, now: float) -> None:
        """Bring the lease table in line with the live workers: stored, then seen, then sent."""
        proposal = self.leasing.propose(active, now)
        same = proposal.holders == active.holders and proposal.replicas == active.replicas
        if same and not active.leases_due:
            return
        number = active.lease_number + 1
        table = self.leasing.table(active, proposal, number)
        self.update(
            active,
            Event("leases", proposal.reason.removeprefix("leases: ")),
            leases=table.SerializeToString(),
            decisions={**active.record.decisions, "leases": proposal.reason},
        )
        active.take_leases(number, proposal.holders, proposal.replicas, proposal.reason, now)
        for node in self.members.present(WORKER):
            self._send_plan(node, active)
            if active.job_id in node.holds:
                self._hub.send(node, coordinator_pb2.SessionResponse(leases=table))

    # --- transitions ------------------------------------------------------------------------------------------------

    def update(self, active: ActiveJob, *events: Event, plan: bytes | None = None, **changes: Any) -> None:
        """Store a transition of the active job. Raises UnreachableError, and then nothing has changed."""
        active.record = self.journal.store(active.record, events, plan, **changes)

    def set_state(
        self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str, *before: Event, **changes: Any
    ) -> None:
        """Move the active job to another state that it lives in. Raises UnreachableError."""
        event = Event("state", f"{scheduler.STATE_WORDS[state]}: {reason}")
        self.update(active, *before, event, state=state, reason=reason, **changes)
        active.progress_at = self.clock()

    def end(
        self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str, *before: Event, **changes: Any
    ) -> None:
        """End the active job; every node forgets it. Raises UnreachableError."""
        self._leave(active, state, reason, *before, ended_unix_ms=unix_ms(), **changes)

    def _leave(
        self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str, *before: Event, **changes: Any
    ) -> None:
        """The cluster is done with the job: durably first, then every node forgets it."""
        table = plan_pb2.LeaseTable(job_id=active.job_id, epoch=active.record.epoch, number=active.lease_number)
        kind = "failure" if state == FAILED else "state"
        self.update(
            active,
            *before,
            Event(kind, f"{scheduler.STATE_WORDS[state]}: {reason}"),
            state=state,
            reason=reason,
            plan_held=False,
            leases=table.SerializeToString(),
            **changes,
        )
        if active.planning is not None and active.planning is not asyncio.current_task():
            active.planning.cancel()
        active.release_start()
        self.active = None
        for node in self.members.everyone_present():
            self._hub.release(node, active.job_id, reason)
