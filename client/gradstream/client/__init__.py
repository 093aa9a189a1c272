"""The Python client of a gradstream coordinator.

    from gradstream.client import Client

    with Client("127.0.0.1:7000") as client:
        job = client.submit("recipes/stdlib-gpt.yaml")
        client.wait(job.job_id)

Importing it loads neither torch nor transformers.
"""

from gradstream.client._async_client import AsyncClient, default_address
from gradstream.client._client import Client
from gradstream.client._errors import (
    CheckpointError,
    ConfigError,
    DataError,
    GradstreamError,
    JobFailedError,
    PlanError,
    ProtocolError,
    StaleEpochError,
    UnreachableError,
)
from gradstream.client._types import (
    Activity,
    Checkpoint,
    Event,
    ExportProgress,
    Job,
    JobState,
    LogLine,
    Node,
    NodeKind,
    Pipeline,
    ServerMemory,
    Step,
    Validation,
    Wait,
    WatchItem,
)
from gradstream.core.config import Recipe, load_recipe
from gradstream.core.timeline import Span, SpanKind, Timeline, chrome_trace

__all__ = [
    "Activity",
    "AsyncClient",
    "Checkpoint",
    "CheckpointError",
    "Client",
    "ConfigError",
    "DataError",
    "Event",
    "ExportProgress",
    "GradstreamError",
    "Job",
    "JobFailedError",
    "JobState",
    "LogLine",
    "Node",
    "NodeKind",
    "Pipeline",
    "PlanError",
    "ProtocolError",
    "Recipe",
    "ServerMemory",
    "Span",
    "SpanKind",
    "StaleEpochError",
    "Step",
    "Timeline",
    "UnreachableError",
    "Validation",
    "Wait",
    "WatchItem",
    "chrome_trace",
    "default_address",
    "load_recipe",
]
