"""The life of nodes and jobs: looks at what is, decides what should be, and brings it about.

`reconcile` is level-triggered: it reads the membership, the active job and the clock, and makes the next transition,
whatever event called for it. So nothing depends on the order of events, and after a restart the same code goes on. All
of it runs on the event loop; only planning and manifests run in threads.

queued → planning → running ⇄ paused → finished | failed | stopped; a lost server leads from running back to planning.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gradstream.coordinator import checkpoints, needs, planner, scheduler
from gradstream.coordinator.active import ActiveJob
from gradstream.coordinator.inventory import take_inventory, take_profile
from gradstream.coordinator.membership import SERVER, WORKER, Membership, NodeEntry
from gradstream.coordinator.notify import Notifier
from gradstream.coordinator.scheduler import Ending, ServerSight, Verdict
from gradstream.coordinator.sessions import Hub, Session
from gradstream.coordinator.state import JobRecord, State
from gradstream.coordinator.timelines import Timelines
from gradstream.core.access import by_caller
from gradstream.core.errors import ConfigError, GradstreamError, PlanError, UnreachableError, one_line
from gradstream.core.leases import Replica, form_replicas
from gradstream.core.log import get_logger
from gradstream.core.plan import Plan
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

log = get_logger()


@dataclass(frozen=True, slots=True)
class Timing:
    """Times in seconds that the coordinator works by."""

    heartbeat_seconds: float = 1.0
    lease_seconds: float = 10.0
    # For a plan's server whose stream broke to come back with its state.
    server_grace_seconds: float = 3.0
    # For a plan's nodes to come back after the coordinator was started anew.
    adopt_grace_seconds: float = 5.0
    # Between looks at the clock; events are acted upon at once.
    tick_seconds: float = 0.2


def unix_ms() -> int:
    """Now."""
    return int(time.time() * 1000)


class Controller:
    """Owns the membership, the sessions and the active job."""

    def __init__(self, state: State, timing: Timing | None = None, clock: Callable[[], float] = time.monotonic):
        self.timing = timing if timing is not None else Timing()
        self.state = state
        self.clock = clock
        self.members = Membership(self.timing.heartbeat_seconds, self.timing.lease_seconds)
        self.notifier = Notifier(state)
        self.timelines = Timelines()
        self.active: ActiveJob | None = None
        # Checkpoints that retention leaves alone.
        self.pins = checkpoints.Pins()
        # Called at the end of each reconcile with the active job, for what others derive from it.
        self.after_reconcile: list[Callable[[ActiveJob], None]] = []
        self._closing = False
        # Whether a job may be queued: saves reading all jobs at every tick of an idle cluster.
        self._queue_changed = True
        self._hub = Hub()
        self._looked_at = clock()
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up what the state holds and begin to watch the clock."""
        for record in self.state.list_jobs():
            if record.state in (PLANNING, RUNNING) or (record.state == PAUSED and record.plan_held):
                self.active = active = ActiveJob.load(record, self.state)
                active.checkpoints.update(
                    await asyncio.to_thread(checkpoints.versions_on_disk, checkpoints.root_of(record.run_directory))
                )
                if active.plan is not None and active.plan.checkpoint_path:
                    root = checkpoints.root_of(record.run_directory)
                    active.release_start = self.pins.pin(root, record.start_version)
                last = active.totals.last
                if record.desired != "run" and last is not None and last.halted:
                    active.halted_version = last.step + 1
                now = self.clock()
                active.progress_at = now
                if active.plan is None and record.state != PLANNING:
                    self.update(active, state=PLANNING, reason="its plan is lost")
                active.expect_holders_until = now + self.timing.adopt_grace_seconds
                for server in active.plan.servers if active.plan is not None else ():
                    active.patience[server.node_id] = now + self.timing.adopt_grace_seconds
                word = scheduler.STATE_WORDS[record.state]
                self.event(record.job_id, "state", f"the coordinator was started anew and found the job {word}")
        self._loop_task = asyncio.create_task(self._watch_clock())

    async def stop(self, grace_seconds: float = 0.0) -> None:
        """Stop deciding; a manifest that is being written has so long to be done. Nodes stay as they are."""
        self._closing = True
        active = self.active
        if active is not None and active.writing is not None:
            await asyncio.wait([active.writing], timeout=grace_seconds)
        tasks = [self._loop_task, active.planning if active else None, active.writing if active else None]
        for task in tasks:
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
        """Enter a node that was checked. Raises ConfigError when another process has taken its name."""
        node, replaced = self.members.register(request, self.clock(), unix_ms())
        for old in replaced:
            self._hub.end(old.node_id, ConfigError(f"another {old.title} has registered since; give each its own name"))
            self._note_node(f"{old.title} was replaced by a newer process of that name")
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
            if active.plan is not None and active.state in (RUNNING, PAUSED):
                if node.kind == WORKER:
                    self._send_plan(node, active)
                    self._warn_if_small(node, active)
                elif active.plan.servers[active.plan.leader].node_id == node_id:
                    self.ask_to_halt(active)
        self.reconcile()
        if node.kind == WORKER and self.active is active and active is not None and active.state in (RUNNING, PAUSED):
            self._hub.send(node, coordinator_pb2.SessionResponse(leases=self._lease_table(active)))
        return session

    def heartbeat(self, session: Session, activity: coordinator_pb2.Activity) -> bool:
        """Renew a node's lease; False when the stream counts no more."""
        return self.members.heartbeat(session.node_id, session.number, activity, self.clock(), unix_ms())

    def note_vitals(self, session: Session, vitals: coordinator_pb2.Vitals) -> None:
        """Keep what a node tells of itself."""
        self.members.note_vitals(session.node_id, vitals)

    def close_session(self, session: Session, why: str) -> None:
        """A stream has ended; its node is dead at once unless it has another by now."""
        self._hub.close(session, why)
        node = self.members.close_session(session.node_id, session.number)
        if node is not None and not self._closing:
            self._note_node(f"{node.title} is gone: {why}")
            self.reconcile()

    def _send_plan(self, node: NodeEntry, active: ActiveJob) -> None:
        if node.holds.get(active.job_id) == active.record.epoch:
            return
        self._hub.send(node, coordinator_pb2.SessionResponse(plan=active.plan_message))
        node.holds[active.job_id] = active.record.epoch

    def _warn_if_small(self, node: NodeEntry, active: ActiveJob) -> None:
        if node not in self.workers(active):
            self._note_node(
                f"{node.title} offers {needs.human_bytes(node.memory_bytes)}, too little for this model: no slots"
            )

    def _note_node(self, message: str) -> None:
        if self.active is None:
            log.info(message)
            return
        try:
            self.event(self.active.job_id, "node", message)
        except UnreachableError as error:
            # A full disk must not keep a dead worker's slots from moving.
            log.error("an event was not stored", cause=one_line(error))

    # --- orders ----------------------------------------------------------------------------------------

    def submit(self, record: JobRecord) -> None:
        """Queue a new job."""
        self.state.create_job(record)
        self._queue_changed = True
        self.event(record.job_id, "submitted", f"submitted{by_caller()}; files in {record.run_directory}")
        self.reconcile()

    def fail(self, job_id: str, reason: str) -> None:
        """End the active job as failed."""
        active = self.active
        if active is not None and active.job_id == job_id:
            self.end(active, FAILED, reason)
        self.reconcile()

    # --- reconciliation ---------------------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Make every transition that is due. Never raises: what failed is tried again at the next tick."""
        if self._closing:
            return
        try:
            now = self.clock()
            self._forgive_own_stall(now)
            for node in self.members.expire(now):
                self._hub.end(node.node_id, "its lease ran out")
                self._note_node(f"{node.title} is gone: no heartbeat for {self.timing.lease_seconds:g} s")
            if self.active is None:
                self._start_next()
            active = self.active
            if active is not None:
                self._advance(active, now)
            if self.active is None:
                self._start_next()
            for follow_up in self.after_reconcile:
                if self.active is not None:
                    follow_up(self.active)
        except GradstreamError as error:
            log.error("could not act; trying again", cause=one_line(error))
        except Exception:
            log.exception("could not act; trying again")

    def _forgive_own_stall(self, now: float) -> None:
        """When this process itself stood still (a large import, a suspended machine), nobody else is to blame."""
        stall = now - self._looked_at - self.timing.tick_seconds
        self._looked_at = now
        if stall > self.timing.heartbeat_seconds:
            self.members.forgive(stall, now)
            if self.active is not None:
                patience = self.active.patience
                patience.update({node_id: until + stall for node_id, until in patience.items()})

    def _start_next(self) -> None:
        if not self._queue_changed:
            return
        record = scheduler.next_job(self.state.list_jobs())
        if record is None:
            self._queue_changed = False
            return
        # What an earlier turn left on nodes was released.
        record = self.save(record, state=PLANNING, reason="its turn has come", plan_held=False)
        self.event(record.job_id, "state", "planning: its turn has come")
        self.active = ActiveJob.load(record, self.state)
        self.active.progress_at = self.clock()
        self._advance(self.active, self.clock())

    def _advance(self, active: ActiveJob, now: float) -> None:
        if active.state == PLANNING:
            self._advance_plan(active, now)
        if active.state in (RUNNING, PAUSED) and self.active is active:
            self._judge_servers(active, now)
        if active.state in (RUNNING, PAUSED) and self.active is active:
            self._judge_end(active)
        if active.state in (RUNNING, PAUSED) and self.active is active:
            self._lease(active, now)

    def _advance_plan(self, active: ActiveJob, now: float) -> None:
        desired = active.record.desired
        if desired != "run":
            if desired == "stop":
                self.end(active, STOPPED, f"stopped at version {active.version} while planning")
            else:
                self._rest_without_plan(active, "paused while planning")
            return
        if active.planning is not None or now < active.held_until:
            return
        if active.plan is not None and self._look_at_servers(active, now)[0] is Verdict.HOLD:
            self.set_state(active, RUNNING, "its servers came back with all of their state; no step is lost")
            self._lease(active, now, force=True)
            return
        servers, workers = self.members.present(SERVER), self.members.present(WORKER)
        if frozenset(node.node_id for node in (*servers, *workers)) == active.refused_nodes:
            return
        if not scheduler.missing_nodes(active.recipe, len(servers), len(workers), active.need_workers):
            active.planning = asyncio.create_task(self._make_plan(active, servers, workers))

    async def _make_plan(self, active: ActiveJob, servers: list[NodeEntry], workers: list[NodeEntry]) -> None:
        record = active.record
        root = checkpoints.root_of(record.run_directory)
        release = None
        try:
            async with self.pins.choosing(root):
                start, versions = await asyncio.to_thread(checkpoints.newest, root)
                if start is not None:
                    release = self.pins.pin(root, start.version)
            acknowledged = self.state.checkpoint_versions(record.job_id)
            if self._is_held(active, checkpoints.missing(root, versions, acknowledged, record.job_id)):
                return
            recipe = active.recipe
            profiles = None
            if recipe.pipeline.stages != 1:
                # Before the inventory, which comes with it.
                profiles = await take_profile(recipe.model.config, recipe.training, recipe.lora)
            model = await take_inventory(recipe.model.config, recipe.lora)
            plan, reasons = await asyncio.to_thread(
                planner.make_plan,
                record.job_id,
                recipe,
                active.manifest,
                model.tensors,
                model.architecture,
                _offers(servers),
                _offers(workers),
                record.epoch + 1,
                start,
                root,
                profiles,
                num_frozen_parameters=model.num_frozen_parameters,
            )
            wanted = self.active is active and active.state == PLANNING and active.record.desired == "run"
            # A server that died meanwhile must not be planned with; the next look starts over.
            if wanted and all(server.present for server in servers):
                self._take_plan(active, plan, reasons, versions)
                active.release_start()
                active.release_start, release = release or (lambda: None), None
        except PlanError as error:
            if record.epoch == 0:
                self.fail(record.job_id, one_line(error))
            else:
                # The cluster held this job before: the nodes that are missing may be on their way back.
                active.refusal = one_line(error)
                active.refused_nodes = frozenset(node.node_id for node in (*servers, *workers))
        except UnreachableError as error:
            log.error("the plan could not be stored; trying again", cause=one_line(error))
        except GradstreamError as error:
            self.fail(record.job_id, one_line(error))
        except OSError as error:
            self.fail(record.job_id, f"{root} cannot be read ({error}); make it readable, then `gradstream resume`")
        except Exception as error:
            log.exception("planning failed")
            self.fail(record.job_id, f"the plan could not be made: {one_line(error)}")
        finally:
            active.planning = None
            if release is not None:
                release()
        self.reconcile()

    def _is_held(self, active: ActiveJob, why: str) -> bool:
        """Note what of the storage keeps the plan from being made, if anything, and when to look again."""
        if why and why != active.hold:
            self.event(active.job_id, "plan", f"held: {why}")
        active.hold = why
        active.held_until = self.clock() + HOLD_SECONDS if why else 0.0
        return bool(why)

    def _take_plan(self, active: ActiveJob, plan: Plan, reasons: dict[str, str], versions: Iterable[int]) -> None:
        """Make a plan the job's, durably first, then tell everyone."""
        message = plan.to_proto()
        before, old_epoch = active.version, active.record.epoch
        self.update(
            active,
            message.SerializeToString(),
            state=RUNNING,
            reason=f"epoch {plan.epoch} from version {plan.start_version}",
            epoch=plan.epoch,
            start_version=plan.start_version,
            plan_held=True,
            decisions={**active.record.decisions, **reasons},
        )
        active.take_plan(message, plan)
        active.checkpoints = set(versions)
        active.totals = self.state.step_totals(active.job_id, plan.epoch, plan.start_version)
        active.pace.steps.clear()
        active.halted_version, active.need_workers = None, False
        active.refusal, active.refused_nodes = "", None
        active.expect_holders_until = 0.0
        active.progress_at = self.clock()
        self.event(active.job_id, "plan", f"epoch {plan.epoch}: {'; '.join(reasons.values())}")
        if old_epoch and before > plan.start_version:
            steps = (
                f"steps {plan.start_version} to {before - 1}"
                if before - 1 > plan.start_version
                else f"step {before - 1}"
            )
            self.event(active.job_id, "plan", f"{steps} are walked again, to the same bits")
        for node in self.members.everyone_present():
            if node.kind == WORKER or plan.server_index(node.node_id) is not None:
                self._send_plan(node, active)
            elif active.job_id in node.holds:
                self._hub.release(node, active.job_id, "the new plan does without it")
        active.holders = [""] * plan.num_slots if old_epoch == 0 else active.holders
        self._lease(active, self.clock(), force=True)

    def _look_at_servers(self, active: ActiveJob, now: float) -> tuple[Verdict, str]:
        assert active.plan is not None
        sights = []
        for server in active.plan.servers:
            node = self.members.get(server.node_id)
            present = node is not None and node.present
            if present:
                active.patience.pop(server.node_id, None)
                patience = 0.0
            else:
                patience = active.patience.setdefault(server.node_id, now + self.timing.server_grace_seconds) - now
            namesake = self.members.named(SERVER, server.name)
            sights.append(
                ServerSight(
                    name=server.name,
                    present=present,
                    holds=node is not None and node.holds.get(active.job_id) == active.record.epoch,
                    replaced=namesake is not None and namesake.node_id != server.node_id,
                    patience_seconds=patience,
                )
            )
        return scheduler.judge_servers(sights)

    def _judge_servers(self, active: ActiveJob, now: float) -> None:
        verdict, reason = self._look_at_servers(active, now)
        if verdict is not Verdict.LOST:
            return
        self.event(active.job_id, "node", f"{reason}; the job goes back to its last checkpoint")
        if active.record.desired == "stop":
            self.end(active, STOPPED, f"stopped at version {active.version}: {reason}")
        elif active.state == PAUSED or active.record.desired == "pause":
            self._rest_without_plan(active, f"paused; {reason}, so it will go on from its last checkpoint")
        else:
            self.set_state(active, PLANNING, f"{reason}; going back to the last checkpoint")
            self._advance_plan(active, now)

    def _judge_end(self, active: ActiveJob) -> None:
        ending, reason = scheduler.judge_end(
            desired=active.record.desired,
            state=active.state,
            version=active.version,
            num_steps=active.num_steps,
            halted_version=active.halted_version,
            checkpoints=active.checkpoints,
            validated=active.fully_validated,
            any_worker=self._any_worker(active),
            early=active.early_ending,
        )
        if ending is Ending.FINISH:
            self.end(active, FINISHED, reason)
        elif ending is Ending.STOP:
            self.end(active, STOPPED, reason)
        elif ending is Ending.PAUSE:
            self.set_state(active, PAUSED, reason)

    def pinned_versions(self, active: ActiveJob) -> set[int]:
        """The versions of the active job whose checkpoints stay, however old: those that a plan starts from or an
        export reads, those that may be a fine-tuning's result, and the bases of jobs that have not ended."""
        root = checkpoints.root_of(active.record.run_directory)
        bases = [
            base
            for record in self.state.list_jobs()
            if record.state not in scheduler.ENDED and (base := base_path(record.recipe_json))
        ]
        return self.pins.of(root) | active.candidates | checkpoints.bases_under(root, bases)

    def workers(self, active: ActiveJob) -> list[NodeEntry]:
        """The live workers with memory enough for the active job, oldest first."""
        if active.plan is None:
            return self.members.present(WORKER)
        plan = active.plan
        need = min(needs.stage_need(plan, place) for place in range(plan.replica_size))
        return [node for node in self.members.present(WORKER) if needs.fits(node.memory_bytes, need)]

    def _expected_holders(self, active: ActiveJob) -> list[str]:
        """Holders that count although they cannot be spoken to.

        Those that have registered and are about to open their stream, and, for a time after the coordinator was started
        anew, those not seen since.
        """
        waiting = self.clock() < active.expect_holders_until
        expected = []
        for holder in active.members:
            node = self.members.get(holder)
            if (waiting and node is None) or (node is not None and node.alive and not node.present):
                expected.append(holder)
        return expected

    def _any_worker(self, active: ActiveJob) -> bool:
        """Whether slots can be computed: in a pipeline that takes a whole replica."""
        plan = active.plan
        workers = self._candidates(active)
        return bool(self._form(active, plan, workers)[0] if plan is not None and plan.has_pipeline else workers)

    def _candidates(self, active: ActiveJob) -> list[str]:
        """The workers that may hold slots, expected ones first."""
        return list(dict.fromkeys([*self._expected_holders(active), *(node.node_id for node in self.workers(active))]))

    def _form(self, active: ActiveJob, plan: Plan, workers: list[str]) -> tuple[list[Replica], str]:
        """The replicas that the next lease table would have, and why."""
        return form_replicas(
            active.replicas, workers, plan.replica_size, active.lease_number + 1, partial(self._fits, plan)
        )

    def _lease(self, active: ActiveJob, now: float, force: bool = False) -> None:
        """Bring the lease table in line with the live workers, and publish it when it changes."""
        workers = self._candidates(active)
        names = {node_id: self.members.name_of(node_id) for node_id in workers}
        plan, replicas, formed = active.plan, active.replicas, ""
        if plan is not None and plan.has_pipeline:
            replicas, formed = self._form(active, plan, workers)
            names = {chain.workers[0]: " → ".join(map(self.members.name_of, chain.workers)) for chain in replicas}
            workers = [chain.workers[0] for chain in replicas]
        holders, reason = scheduler.lease_slots(active.holders, workers, active.resting, names, formed)
        if holders == active.holders and replicas == active.replicas and not force:
            return
        active.replicas = replicas
        active.take_holders(holders)
        active.lease_reason = reason
        active.lease_number += 1
        active.progress_at = now
        table = self._lease_table(active)
        decisions = {**active.record.decisions, "leases": reason}
        self.update(active, leases=table.SerializeToString(), decisions=decisions)
        self.event(active.job_id, "leases", reason.removeprefix("leases: "))
        for node in self.members.present(WORKER):
            self._send_plan(node, active)
            self._hub.send(node, coordinator_pb2.SessionResponse(leases=table))

    def _fits(self, plan: Plan, worker: str, place: int) -> bool:
        """Whether a worker's memory holds what a place of a replica needs; one that is about to come back did."""
        node = self.members.get(worker)
        return node is None or needs.fits(node.memory_bytes, needs.stage_need(plan, place))

    def _lease_table(self, active: ActiveJob) -> plan_pb2.LeaseTable:
        """The table as workers get it."""

        def described(node_id: str) -> plan_pb2.PipelineWorker:
            node = self.members.get(node_id)
            # One that has not come back since this process was started anew is where it was: it is the same process.
            address = node.address if node is not None else active.addresses.get(node_id, "")
            return plan_pb2.PipelineWorker(node_id=node_id, name=self.members.name_of(node_id), address=address)

        return active.lease_table(described)

    def publish_leases_again(self, active: ActiveJob) -> None:
        """Send the same leases under a higher number, to workers that a halt put to rest."""
        self._lease(active, self.clock(), force=True)

    def ask_to_halt(self, active: ActiveJob) -> None:
        """Tell the leader, if it is here, of a pause or stop that it has not answered yet."""
        if active.record.desired != "run":
            self.ask_for_boundary(active)

    def leader_stream(self, active: ActiveJob) -> tuple[int, int] | None:
        """(epoch, number of the stream) by which the active job's leader is told things; None while it is away."""
        if active.plan is None:
            return None
        leader = self.members.get(active.plan.servers[active.plan.leader].node_id)
        return (active.record.epoch, leader.session) if leader is not None and leader.present else None

    def ask_for_boundary(self, active: ActiveJob) -> bool:
        """Ask the leader, if it is here and the job runs, for a checkpoint at its next commit; whether it was asked."""
        if active.plan is None or active.state != RUNNING or active.resting:
            return False
        leader = self.members.get(active.plan.servers[active.plan.leader].node_id)
        if leader is not None and leader.present and self._any_worker(active):
            boundary = coordinator_pb2.BoundaryRequest(job_id=active.job_id, epoch=active.record.epoch)
            self._hub.send(leader, coordinator_pb2.SessionResponse(boundary=boundary))
            return True
        return False

    # --- transitions ------------------------------------------------------------------------------------------------

    def set_state(self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str) -> None:
        """Move the active job to another state that it lives in."""
        self.update(active, state=state, reason=reason)
        active.progress_at = self.clock()
        self.event(active.job_id, "state", f"{scheduler.STATE_WORDS[state]}: {reason}")

    def _rest_without_plan(self, active: ActiveJob, reason: str) -> None:
        """Pause a job whose state no server holds, and give the cluster to the next one."""
        self._leave(active, PAUSED, reason, ended=0)

    def end(self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str) -> None:
        """End the active job; every node forgets it."""
        self._leave(active, state, reason, ended=unix_ms())

    def _leave(self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str, ended: int) -> None:
        """The cluster is done with the job: durably first, then every node forgets it."""
        table = plan_pb2.LeaseTable(job_id=active.job_id, epoch=active.record.epoch, number=active.lease_number)
        self.update(
            active,
            state=state,
            reason=reason,
            ended_unix_ms=ended,
            plan_held=False,
            leases=table.SerializeToString(),
        )
        kind = "failure" if state == FAILED else "state"
        self.event(active.job_id, kind, f"{scheduler.STATE_WORDS[state]}: {reason}")
        if active.planning is not None and active.planning is not asyncio.current_task():
            active.planning.cancel()
        active.release_start()
        self.active = None
        for node in self.members.everyone_present():
            self._hub.release(node, active.job_id, reason)

    def save(self, record: JobRecord, plan: bytes | None = None, **changes: Any) -> JobRecord:
        """Store a job with changes; return the new record."""
        changed = replace(record, **changes)
        self.state.save_job(changed, plan)
        self._queue_changed = True
        self.notifier.changed(record.job_id)
        return changed

    def update(self, active: ActiveJob, plan: bytes | None = None, **changes: Any) -> None:
        """Store the active job with changes."""
        # The view follows the state, never the other way round: when storing fails nothing has changed.
        active.record = self.save(active.record, plan, **changes)

    def event(self, job_id: str, kind: str, message: str) -> None:
        """Add an event to a job's history."""
        log.info(message, job=job_id, kind=kind)
        event = jobs_pb2.Event(unix_ms=unix_ms(), kind=kind, message=message)
        self.notifier.append(job_id, [jobs_pb2.WatchJobResponse(event=event)])


def base_path(recipe_json: str) -> str:
    """Where the base of a fine-tuning's recipe lies; empty for any other job."""
    finetuning = json.loads(recipe_json).get("finetuning") or {}
    return str((finetuning.get("base") or {}).get("path", ""))


def _offers(nodes: Iterable[NodeEntry]) -> list[needs.NodeOffer]:
    return [
        needs.NodeOffer(node.node_id, node.name, node.address, node.memory_bytes, node.flops_per_second)
        for node in nodes
    ]
