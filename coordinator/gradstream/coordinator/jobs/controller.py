"""The life of nodes and jobs: reconciles the actual state with the desired state.

`reconcile` is level-triggered: it reads the membership, the active job and the clock, and makes every transition that
is due. Events only trigger it. So the order of events does not matter, the same code continues after a restart, and a
transition that could not be stored is due again. Everything runs on the event loop; only planning and the writing of
manifests run in threads.

queued → planning → running ⇄ paused → finished | failed | stopped; a lost server, or an order to replan, leads from
running back to planning.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

from gradstream.coordinator.jobs import checkpoints, decisions, plan_making, stalls
from gradstream.coordinator.jobs.active import ActiveJob, Refusal, nothing
from gradstream.coordinator.jobs.boundaries import Boundaries
from gradstream.coordinator.jobs.decisions import Ending
from gradstream.coordinator.jobs.journal import Event, Journal, Retry
from gradstream.coordinator.jobs.leasing import Leasing
from gradstream.coordinator.jobs.plan_making import MadePlan, PlanMaking, PlanNodes, Setback
from gradstream.coordinator.jobs.recovery import recover
from gradstream.coordinator.jobs.round_work import RoundWork
from gradstream.coordinator.jobs.server_watch import ServerWatch
from gradstream.coordinator.jobs.transitions import Transitions
from gradstream.coordinator.nodes.membership import SERVER, WORKER, NodeEntry
from gradstream.coordinator.nodes.registry import NodeRegistry
from gradstream.coordinator.nodes.reunion import Verdict
from gradstream.coordinator.nodes.sessions import OpenSession
from gradstream.coordinator.nodes.storage_checks import StorageChecks
from gradstream.coordinator.planning.needs import human_bytes
from gradstream.coordinator.state.notify import Notifier
from gradstream.coordinator.state.state import JobRecord, State
from gradstream.coordinator.state.threads import StateReads, StateWrites
from gradstream.coordinator.telemetry.counts import Counts
from gradstream.coordinator.telemetry.sampling import decide_sampling
from gradstream.coordinator.telemetry.timelines import Timelines
from gradstream.coordinator.timing import Timing
from gradstream.core.errors import GradstreamError, UnreachableError, one_line
from gradstream.core.job_states import FAILED, FINISHED, PAUSED, PLANNING, QUEUED, RUNNING, STATE_WORDS, STOPPED
from gradstream.core.log import get_logger
from gradstream.core.rpc.access import by_caller
from gradstream.core.storage.pool import LOAD_SECONDS, StorageThreads
from gradstream.proto.v1 import coordinator_pb2

log = get_logger()


class Controller:
    """Owns the membership, the sessions and the active job."""

    def __init__(self, state: State, timing: Timing | None = None, clock: Callable[[], float] = time.monotonic):
        self.timing = timing if timing is not None else Timing()
        self.state = state
        self.clock = clock
        self.nodes = NodeRegistry(self.timing, clock())
        self.members = self.nodes.members
        self.reads = StateReads(state)
        self.writes = StateWrites(state)
        self.notifier = Notifier(state, self.reads, self.writes)
        self.counts = Counts()
        self.notifier.observers.append(self.counts.take)
        # How often jobs went on after servers were lost: servers_back, rolled_back.
        self.num_recoveries: Counter[str] = Counter()
        self.journal = Journal(state, self.notifier)
        self.timelines = Timelines()
        self.leasing = Leasing(self.members, self.timing, self.timelines)
        self.transitions = Transitions(state, self.journal, self.nodes, self.leasing, self.timing, clock)
        self.round_work = RoundWork(self.nodes, self.journal)
        self.servers = ServerWatch(self.members, self.timing, self.reconcile)
        # Checkpoints that retention keeps.
        self.pins = checkpoints.Pins()
        # Functions that each `reconcile` calls at its end with the active job.
        self.after_reconcile: list[Callable[[ActiveJob], None]] = []
        # Why the last `reconcile` could not make its transitions, and the time of the next one.
        self.retry = Retry(self.timing.retry_seconds)
        # When a node that came or went last caused a reconcile.
        self._membership_at = -math.inf
        self._closing = False
        self.boundaries = Boundaries(self.members, self.leasing, self.nodes.send)
        self.storage = StorageChecks(self.nodes.send)
        # Threads that read and write checkpoints.
        self.disk = StorageThreads(LOAD_SECONDS)
        self.plan_making = PlanMaking(state, self.members, self.pins, self.disk, self.storage, clock)
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def active(self) -> ActiveJob | None:
        """The job that the cluster works on; None while it works on none."""
        return self.transitions.active

    async def start(self) -> None:
        """Load the job under way from the state, and start the task that watches the clock."""
        for record in self.state.list_jobs((PLANNING, RUNNING, PAUSED)):
            if record.state in (PLANNING, RUNNING) or (record.state == PAUSED and record.plan_held):
                await self._adopt(record)
        self._loop_task = asyncio.create_task(self._watch_clock())

    async def _adopt(self, record: JobRecord) -> None:
        """Go on with a job that an earlier process of the coordinator had under way."""
        if self.active is not None:
            # An older release wrote this state; it could leave two jobs under way.
            self.journal.store(record, [Event("state", "queued again")], state=QUEUED, reason="waits for its turn")
            return
        active = self.transitions.load(record)
        if active is None:
            return
        await recover(active, self.state, self.pins, self.disk)
        now = self.clock()
        active.progress_at = now
        active.expect_holders_until = now + self.timing.adopt_grace_seconds
        self.transitions.adopt(active)
        word = STATE_WORDS[record.state]
        self.journal.note(record.job_id, "state", f"the coordinator was restarted and found the job {word}")

    async def stop(self, grace_seconds: float = 0.0) -> None:
        """Stop deciding. A manifest that is being written gets `grace_seconds`. Nodes are left as they are."""
        self._closing = True
        active = self.active
        if active is not None and active.writing is not None:
            await asyncio.wait([active.writing], timeout=grace_seconds)
        await self.servers.stop()
        work = [active.planning.task, active.writing] if active is not None else []
        for task in [self._loop_task, *work]:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self.nodes.end_all()

    async def _watch_clock(self) -> None:
        while True:
            self._tick()
            await asyncio.sleep(self.timing.tick_seconds)

    def _tick(self) -> None:
        """End the nodes whose lease has run out, and reconcile."""
        if self._closing:
            return
        now = self.clock()
        missed = self.nodes.forgive_own_stall(now)
        if missed and self.active is not None:
            self.active.reunion.forgive(missed)
        for node in self.nodes.expire(now):
            self._note_node(f"{node.title} is gone: no heartbeat for {self.timing.lease_seconds:g} s")
        self.reconcile()

    # --- nodes ------------------------------------------------------------------------------------------------------

    def register(self, request: coordinator_pb2.RegisterRequest) -> NodeEntry:
        """Enter a node whose registration was checked.

        Raises ConfigError when another live process has its name, BusyError while that is not known.
        """
        now = self.clock()
        self.servers.keep_name(self.active, request, now)
        return self.nodes.register(request, now)

    def open_session(self, node_id: str) -> OpenSession | None:
        """Begin a node's session and queue the directives that stand; None when the node is not registered."""
        active = self.active
        opened = self.nodes.open_session(node_id, active.plan_message if active is not None else None)
        if opened is None:
            return None
        node, session = opened
        if active is not None:
            self._note_arrival(node, active)
        self._membership_changed()
        return session

    def _note_arrival(self, node: NodeEntry, active: ActiveJob) -> None:
        """Note that a node is here, and send a worker the plan and the lease table."""
        self._note_node(f"{node.title} is here ({node.device})")
        if active.plan is not None and active.state in (RUNNING, PAUSED) and node.kind == WORKER:
            self.transitions.welcome(node, active)
            if node not in self.leasing.workers(active):
                has = human_bytes(node.memory_bytes)
                self._note_node(f"{node.title} offers {has}, too little for this model: no slots")

    def close_session(self, session: OpenSession, why: str) -> None:
        """Note that a session has ended. Its node is silent at once, unless it has opened another one."""
        node = self.nodes.close_session(session, why)
        if node is not None and not self._closing:
            self._note_node(f"{node.title} is gone: {why}")
            self._membership_changed()

    def _membership_changed(self) -> None:
        """Reconcile after a node came or went: at once, or at the next tick if the last change is less than a tick old.

        So nodes that come or go together share a lease table.
        """
        now = self.clock()
        if now - self._membership_at >= self.timing.tick_seconds:
            self._membership_at = now
            self.reconcile()

    def _note_node(self, message: str) -> None:
        if self.active is None:
            log.info(message)
        else:
            self.journal.note(self.active.job_id, "node", message)

    # --- orders and reports -----------------------------------------------------------------------------------------

    def submit(self, record: JobRecord, warnings: Sequence[str] = (), start_note: str = "") -> None:
        """Queue a new job. `warnings` on its recipe and a note on its start become events. Raises UnreachableError."""
        submitted = Event("submitted", f"submitted{by_caller()}; files in {record.run_directory}")
        notes = [Event("submitted", start_note)] if start_note else []
        self.journal.create(record, [submitted, *notes, *(Event("warning", warning) for warning in warnings)])
        self.reconcile()

    def fail(self, job_id: str, reason: str) -> None:
        """End the active job as failed. Raises UnreachableError."""
        active = self.active
        if active is not None and active.job_id == job_id:
            self.transitions.end(active, FAILED, reason)
        self.reconcile()

    def node_failed(self, active: ActiveJob, node: NodeEntry, message: str) -> None:
        """Bench a node that cannot go on. The job fails when no other node of its kind can. Raises UnreachableError."""
        now = self.clock()
        active.benches.bench(node.node_id, node.title, message, True, now)
        if node.kind == SERVER:
            active.reunion.failures[node.node_id] = message
            others = bool(self.plan_making.servers(active))
        else:
            # The node has dropped the job. After its time on the bench it gets the plan again.
            node.holds.pop(active.job_id, None)
            others = bool(self.leasing.candidates(active, now))
        if others:
            self._note_node(f"{node.title} is benched for this job: {message}")
        elif node.kind == SERVER or active.plan is None:
            self.fail(active.job_id, active.benches.failures())
        else:
            # The servers still hold the state: the job fails once a checkpoint has it.
            active.failing = active.benches.failures()
            self._note_node(f"{node.title} cannot go on, nor can another worker: {message}")
        self.reconcile()

    # --- reconciliation ---------------------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Make every transition that is due. Never raises: a failed transition is retried at growing intervals."""
        if self._closing:
            return
        now = self.clock()
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
                log.error("a transition could not be made; trying again", cause=one_line(error))
        except Exception as error:
            if self.retry.failed(one_line(error), now):
                log.exception("a transition could not be made; trying again")

    def _start_next(self) -> None:
        while self.active is None and self.journal.jobs_changed:
            record = decisions.next_job(self.state.list_jobs((QUEUED,)))
            if record is None:
                self.journal.jobs_changed = False
                return
            active = self.transitions.begin(record)
            if active is not None:
                self._advance(active, self.clock())

    def _advance(self, active: ActiveJob, now: float) -> None:
        for bench in active.benches.lift(now, lambda node, since: stalls.has_recovered(self.members.get(node), since)):
            self._note_node(f"{bench.title} is no longer benched; the cause was: {bench.reason}")
        if active.failing and self.leasing.candidates(active, now):
            active.failing = ""
        steps: list[Callable[[ActiveJob, float], None]] = [
            self._judge_servers,
            self._judge_end,
            self.leasing.bench_stuck,
            self._sample_timelines,
            self._lease,
            self.round_work.share,
            self.boundaries.ask_for_boundary,
        ]
        if active.state in (RUNNING, PAUSED) and active.plan is None:
            self.transitions.set_state(active, PLANNING, "its plan is lost")
        if active.state == PLANNING:
            self._advance_plan(active, now)
        for step in steps:
            if active.state in (RUNNING, PAUSED) and self.active is active:
                step(active, now)

    # --- planning ---------------------------------------------------------------------------------------------------

    def _advance_plan(self, active: ActiveJob, now: float) -> None:
        desired = active.record.desired
        if self._plan_stands(active, now):
            return  # also for a stop and a pause: the servers can still write a checkpoint of their state
        if active.failing:
            self.transitions.end(active, FAILED, active.failing)
        elif desired == "stop":
            left = self.transitions.unsaved(active)
            self.transitions.end(active, STOPPED, f"stopped at {active.place} while planning{left}")
        elif desired == "pause":
            self.transitions.leave(active, PAUSED, "paused while planning")
        elif (nodes := self.plan_making.due(active, now)) is not None:
            active.planning.task = asyncio.create_task(self._make_plan(active, nodes))

    def _plan_stands(self, active: ActiveJob, now: float) -> bool:
        """Whether the former plan of a job in planning can still return to force, or has."""
        if active.plan is None:
            return False
        verdict, reason = self.servers.look(active, now)
        if verdict is Verdict.HOLD:
            reason = "its servers came back with all of their state; no step is lost"
            self.transitions.set_state(active, RUNNING, reason)
            self.num_recoveries["servers_back"] += 1
            active.leases_due = True
        elif verdict is Verdict.WAIT and reason != active.planning.server_wait:
            active.planning.server_wait = reason
            self._note_node(f"{reason}; the job waits for its state before it goes back to a checkpoint")
        return verdict is not Verdict.LOST

    async def _make_plan(self, active: ActiveJob, nodes: PlanNodes) -> None:
        release = nothing
        try:
            outcome = await self.plan_making.make(active, nodes)
            release = outcome.release
            if outcome.line:
                self.journal.note(active.job_id, "plan", outcome.line)
            if outcome.is_held:
                return
            setback = outcome.setback
            if outcome.made is not None:
                is_taken, setback = self._store_plan(active, outcome.made, nodes)
                if is_taken:
                    active.release_start()
                    active.release_start, release = release, nothing
            cause = self._take_setback(active, setback, nodes)
        finally:
            active.planning.task = None
            release()
        if cause and active.planning.retry.failed(cause, self.clock()):
            log.error("no plan yet; trying again", job=active.job_id, cause=cause)
        self.reconcile()

    def _store_plan(self, active: ActiveJob, made: MadePlan, nodes: PlanNodes) -> tuple[bool, Setback]:
        """Accept a plan. Return whether it was taken, and the setback if it could not be stored."""
        try:
            is_taken = self._accept_plan(active, made, nodes)
        except Exception as error:
            return False, plan_making.judge_error(error, active.record, plan_making.STORED)
        active.planning.retry.succeeded()
        return is_taken, Setback()

    def _accept_plan(self, active: ActiveJob, made: MadePlan, nodes: PlanNodes) -> bool:
        """Take a plan that was just made, if the job still needs it; return whether it was taken.

        The situation may have changed while the plan was made: the servers may be back with all of their state, or a
        planned node may have died. The plan is then dropped, and the next `reconcile` starts over.
        """
        wanted = self.active is active and active.state == PLANNING and active.record.desired in ("run", "replan")
        stands = wanted and self._plan_stands(active, self.clock())
        if not wanted or stands or not all(server.present for server in nodes.servers):
            return False
        self.transitions.take_plan(active, made)
        return True

    def _take_setback(self, active: ActiveJob, setback: Setback, nodes: PlanNodes) -> str:
        """Act on a setback; return the cause for which the next attempt waits, "" for none."""
        if setback.refusal:
            active.planning.refusal = Refusal(setback.refusal, nodes.ids)
        if setback.failure:
            try:
                self.fail(active.job_id, setback.failure)
            except UnreachableError as error:
                return f"the failure to be stored ({setback.failure}): {one_line(error)}"
        return setback.cause

    # --- a job with a plan ------------------------------------------------------------------------------------------

    def _judge_servers(self, active: ActiveJob, now: float) -> None:
        verdict, reason = self.servers.look(active, now)
        if verdict is not Verdict.LOST:
            return
        event = Event("node", f"{reason}; the job goes back to its last checkpoint")
        if active.record.desired == "stop":
            left = self.transitions.unsaved(active)
            self.transitions.end(active, STOPPED, f"stopped at {active.place}{left}: {reason}", event)
        elif active.state == PAUSED or active.record.desired == "pause":
            # The cluster is free for another job.
            reason = f"paused; {reason}, so it will go on from its last checkpoint"
            self.transitions.leave(active, PAUSED, reason, event)
        else:
            self.transitions.set_state(active, PLANNING, f"{reason}; going back to the last checkpoint", event)
            self.num_recoveries["rolled_back"] += 1
            self._advance_plan(active, now)

    def _judge_end(self, active: ActiveJob, now: float) -> None:
        skips = decisions.judge_skips(active.totals, active.record.epoch, active.recipe)
        if skips:
            self.transitions.end(active, FAILED, skips)
            return
        can_end_step, settled = self.leasing.can_end_step(active, now), self.servers.settled(active)
        ending, reason = decisions.judge_end(active.sight(can_end_step, settled))
        if ending is Ending.FINISH:
            self.transitions.end(active, FINISHED, reason)
        elif ending is Ending.STOP:
            self.transitions.end(active, STOPPED, reason)
        elif ending is Ending.FAIL:
            self.transitions.end(active, FAILED, reason)
        elif ending is Ending.PAUSE:
            self.transitions.set_state(active, PAUSED, reason)
        elif ending is Ending.REPLAN:
            self.transitions.give_up_plan(active, reason)
            self._advance_plan(active, now)
        elif ending is Ending.SNAPSHOT:
            line = self.boundaries.ask_for_snapshot(active, now)
            if line:
                self.journal.note(active.job_id, "checkpoint", line)

    def _sample_timelines(self, active: ActiveJob, now: float) -> None:
        """Let workers report as many timelines as the coordinator can take."""
        assert active.plan is not None
        num_slots = active.recipe.training.num_slots
        num_workers = min(len(self.members.present(WORKER)), num_slots * active.plan.replica_size)
        sampling, reason = decide_sampling(active.sampling, num_workers, num_slots, stalls.step_seconds(active))
        if sampling != active.sampling:
            log.info("timelines", job=active.job_id, sampling=reason)
            self.transitions.take_sampling(active, sampling)

    def _lease(self, active: ActiveJob, now: float) -> None:
        """Update the lease table to the live workers."""
        proposal = self.leasing.propose(active, now)
        same = proposal.holders == active.holders and proposal.replicas == active.replicas
        if same and not active.leases_due:
            return
        self.transitions.take_leases(active, proposal, now)
