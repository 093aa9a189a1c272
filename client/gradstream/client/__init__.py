"""The Python client of a gradstream cluster.

    from gradstream.client import Client

    with Client("127.0.0.1:7000") as client:
        job = client.submit("recipes/stdlib-gpt.yaml")
        client.wait(job.job_id)

FineTuningClient is that of a fine-tuning service. Importing it loads neither torch nor transformers.
"""

from gradstream.client._async_client import AsyncClient, default_address
from gradstream.client._async_fine_tuning_client import AsyncFineTuningClient, default_fine_tuning_address
from gradstream.client._client import Client
from gradstream.client._errors import (
    AccessError,
    BusyError,
    CheckpointError,
    ConfigError,
    CredentialsError,
    DataError,
    FineTuningFailedError,
    GradstreamError,
    JobFailedError,
    PlanError,
    ProtocolError,
    StaleEpochError,
    UnreachableError,
)
from gradstream.client._fine_tuning_client import FineTuningClient
from gradstream.client._fine_tuning_types import (
    Evaluation,
    ExamplesPreview,
    ExamplesReport,
    FineTuning,
    FineTuningState,
    FineTuningWatchItem,
    GeneratedText,
    Generation,
    RenderedExample,
    RenderedPiece,
    Sample,
)
from gradstream.client._job_types import ExportProgress, Job, JobState, Pipeline, RemovedJob, ServerMemory, Wait
from gradstream.client._node_types import Activity, Node, NodeKind
from gradstream.client._step_types import StepBreakdown, StepMetrics, StepParts, WorkerTimes
from gradstream.client._watch_types import Checkpoint, Event, LogLine, Step, Validation, WatchItem
from gradstream.core.plan.forecast import (
    ExchangeOption,
    Forecast,
    LinkForecast,
    PlaceForecast,
    ServerForecast,
    StageForecast,
)
from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe, load_fine_tuning_recipe
from gradstream.core.recipe.loading import load_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.telemetry.timeline import Span, SpanKind, Timeline
from gradstream.core.telemetry.trace import chrome_trace

__all__ = [
    "AccessError",
    "Activity",
    "AsyncClient",
    "AsyncFineTuningClient",
    "BusyError",
    "Checkpoint",
    "CheckpointError",
    "Client",
    "ConfigError",
    "CredentialsError",
    "DataError",
    "Evaluation",
    "Event",
    "ExamplesPreview",
    "ExamplesReport",
    "ExchangeOption",
    "ExportProgress",
    "FineTuning",
    "FineTuningClient",
    "FineTuningFailedError",
    "FineTuningRecipe",
    "FineTuningState",
    "FineTuningWatchItem",
    "Forecast",
    "GeneratedText",
    "Generation",
    "GradstreamError",
    "Job",
    "JobFailedError",
    "JobState",
    "LinkForecast",
    "LogLine",
    "Node",
    "NodeKind",
    "Pipeline",
    "PlaceForecast",
    "PlanError",
    "ProtocolError",
    "Recipe",
    "RemovedJob",
    "RenderedExample",
    "RenderedPiece",
    "Sample",
    "ServerForecast",
    "ServerMemory",
    "Span",
    "SpanKind",
    "StageForecast",
    "StaleEpochError",
    "Step",
    "StepBreakdown",
    "StepMetrics",
    "StepParts",
    "Timeline",
    "UnreachableError",
    "Validation",
    "Wait",
    "WatchItem",
    "WorkerTimes",
    "chrome_trace",
    "default_address",
    "default_fine_tuning_address",
    "load_fine_tuning_recipe",
    "load_recipe",
]
