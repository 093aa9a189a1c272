"""The table of all metrics. The reference in the docs is written from it; dashboard and alerts are checked against it.

A role's module of readings maps the role's state to values of these metrics. Labels have few values: no metric has a
label for slots, bundles, versions or addresses, and only the coordinator names nodes.
"""

from __future__ import annotations

from gradstream.core.metrics.definition import ROLES, Kind, Metric
from gradstream.core.rpc.access import COORDINATOR

TABLE: list[Metric] = []
"""All metrics, in the order of the docs."""


class _Group:
    """Adds metrics of some roles to the table. Each has the group's labels, then its own."""

    def __init__(self, *roles: str, **labels: str):
        self._roles = roles
        self._labels = labels

    def gauge(self, name: str, help: str, **labels: str) -> Metric:
        return self._add(name, "gauge", help, labels)

    def counter(self, name: str, help: str, **labels: str) -> Metric:
        return self._add(name, "counter", help, labels)

    def info(self, name: str, help: str, **labels: str) -> Metric:
        return self._add(name, "info", help, labels)

    def _add(self, name: str, kind: Kind, help: str, labels: dict[str, str]) -> Metric:
        metric = Metric(f"gradstream_{name}", kind, help, self._roles, {**self._labels, **labels})
        TABLE.append(metric)
        return metric


_KIND = "server, worker"
_PART = "state, waiting (contributions), newcomer (whole bundles for workers without the version before)"

# ---- Every role ------------------------------------------------------------------------------------------------------

_all = _Group(*ROLES)
BUILD = _all.info("build_info", "1, with the release.", version="the release", role=", ".join(ROLES))
DISK_FREE = _all.gauge("disk_free_bytes", "Free bytes where the role writes; absent when unknown.")
QUEUE_ITEMS = _all.gauge("queue_items", "Items that wait in a bounded queue.", queue="directives, queued_jobs")
QUEUE_BYTES = _all.gauge("queue_bytes", "Bytes that wait in a bounded queue.", queue="timelines")

# ---- Coordinator: jobs -----------------------------------------------------------------------------------------------

_cluster = _Group(COORDINATOR)
_job = _Group(COORDINATOR, job="the job's id")
JOB = _job.info("job_info", "1 for the job that the cluster works on.", state="planning, running, paused")
JOBS_ENDED = _cluster.counter("jobs_ended_total", "Jobs that ended.", state="finished, failed, stopped")
JOB_VERSION = _job.gauge("job_version", "Version of the weights: number of commits of the trajectory.")
JOB_STEP = _job.gauge("job_step", "Steps of the trajectory that are committed.")
JOB_PLANNED_STEPS = _job.gauge("job_planned_steps", "Steps of the whole job.")
JOB_LEDGER_TOKENS = _job.gauge("job_ledger_tokens", "Target tokens of the trajectory, by the ledger.")
JOB_STEPS = _job.counter("job_steps_total", "Steps committed, recomputed ones again. Inner steps count.")
JOB_COMMITS = _job.counter("job_commits_total", "Commits: of steps, or of rounds of local steps.")
JOB_TOKENS = _job.counter("job_tokens_total", "Target tokens of the commits.")
JOB_SAMPLES = _job.counter("job_samples_total", "Samples of the commits.")
JOB_SKIPPED = _job.counter("job_skipped_steps_total", "Commits without effect, as loss or norm was not finite.")
JOB_SKIPS_IN_A_ROW = _job.gauge("job_consecutive_skips", "Skipped commits in a row up to now.")
JOB_BYTES = _job.counter(
    "job_payload_bytes_total",
    "Payload bytes of contributions (push) and weights (pull), by the servers' reports.",
    direction="push, pull",
    codec="the codec of the step's contributions, or of the next version",
)
JOB_LOSS = _job.gauge("job_loss", "Mean training loss of the last commit, in nats.")
JOB_VALIDATION_LOSS = _job.gauge("job_validation_loss", "Loss of the last complete validation pass, in nats.")
JOB_GRADIENT_NORM = _job.gauge("job_gradient_norm", "Global gradient norm of the last commit, before clipping.")
JOB_LEARNING_RATE = _job.gauge("job_learning_rate", "Learning rate of the last commit.")
JOB_PHASES = _job.gauge(
    "job_step_phase_seconds",
    "Parts of a step's time: means over workers and the last 32 steps. Their sum is the step's time.",
    phase="compute, weights, send, slots, servers, other",
)
JOB_HIDDEN = _job.gauge("job_hidden_communication_ratio", "Share of the communication that compute overlapped.")
JOB_BUBBLE = _job.gauge("job_bubble_ratio", "Share of the time in which a pipeline's workers wait.")
JOB_IDLE = _job.gauge("job_idle_seconds", "Seconds since the job's last progress.")
JOB_EPOCH = _job.gauge("job_epoch", "Number of the plan in force.")
JOB_LEASE_TABLE = _job.gauge("job_lease_table", "Number of the lease table in force.")
JOB_SLOTS = _job.gauge("job_slots", "Slots by state in the lease table.", state="held, free")
JOB_BENCHED = _job.gauge("job_benched_nodes", "Nodes that get no work of the job for a time.")
JOB_CHECKPOINTS = _job.counter("job_checkpoints_total", "Checkpoints whose manifest was written.")
JOB_CHECKPOINT_BYTES = _job.counter("job_checkpoint_bytes_total", "Bytes of these checkpoints.")
JOB_CHECKPOINT_VERSION = _job.gauge("job_checkpoint_version", "Version of the newest checkpoint.")
JOB_CHECKPOINT_TIME = _job.gauge(
    "job_checkpoint_timestamp_seconds", "Unix time of the last checkpoint since the coordinator's start."
)
JOB_UNWRITTEN = _job.gauge("job_unwritten_checkpoints", "Checkpoints whose manifest cannot be written.")
RECOVERIES = _cluster.counter(
    "recoveries_total",
    "How jobs went on after servers were lost.",
    kind="servers_back (with all of their state), rolled_back (to the last checkpoint)",
)
STATE_UNWRITABLE = _cluster.gauge("state_unwritable", "1 while the coordinator cannot store its state, else 0.")

# ---- Coordinator: nodes ----------------------------------------------------------------------------------------------

_node = _Group(COORDINATOR, node="the node's name", kind=_KIND)
_server = _Group(COORDINATOR, node="the server's name", part=_PART)
NODES = _cluster.gauge("nodes", "Nodes by state.", kind=_KIND, state="live, gone (the last 64), refused")
NODES_LOST = _cluster.counter("nodes_lost_total", "Nodes that went without saying that they leave.", kind=_KIND)
LEASE = _cluster.gauge("lease_seconds", "Time without a heartbeat after which a node is silent.")
NODE_HEARTBEAT_AGE = _node.gauge("node_heartbeat_age_seconds", "Seconds since a live node's last heartbeat.")
NODE_MEMORY_LIMIT = _node.gauge("node_memory_limit_bytes", "Memory that a node offers to jobs.")
NODE_RESIDENT = _node.gauge("node_resident_memory_bytes", "Resident memory of a node's process.")
NODE_MEMORY_FREE = _node.gauge("node_available_memory_bytes", "Available memory of a node's machine or container.")
NODE_DISK_FREE = _node.gauge("node_disk_free_bytes", "Free bytes where a node writes.")
NODE_CLOCK_AHEAD = _node.gauge("node_clock_ahead_seconds", "Lead of a node's clock over the coordinator's.")
NODE_ROUND_TRIP = _node.gauge("node_round_trip_seconds", "Round trip from a node to the coordinator.")
NODE_UNREACHABLE = _node.gauge(
    "node_unreachable_seconds", "Seconds for which a node has not reached a peer that it needs, else 0."
)
SERVER_MEMORY = _server.gauge("server_memory_bytes", "A server's memory for the job.")
SERVER_PLANNED_PEAK = _cluster.gauge(
    "server_planned_peak_memory_bytes", "A server's peak memory by the plan.", node="the server's name"
)
SERVER_PLANNED = _server.gauge(
    "server_planned_memory_bytes", "The same by the plan: what state takes, and the most that the others take."
)
