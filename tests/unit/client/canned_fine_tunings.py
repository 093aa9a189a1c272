"""A real gRPC server that implements FineTuningService with canned answers, for tests of the client and of the CLI."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any

from canned_jobs import SUBMITTED_MS, canned_history, canned_job, serving_by

from gradstream.core.errors import CheckpointError, ConfigError, DataError
from gradstream.core.rpc import errors as rpc_errors
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.proto.v1 import fine_tuning_pb2_grpc, jobs_pb2


def canned_report() -> pb.ExamplesReport:
    """What became of ten rows."""
    return pb.ExamplesReport(
        format="prompt-completion",
        num_rows=10,
        num_train=6,
        num_validation=2,
        num_bad=1,
        num_too_long=1,
        num_target_tokens=1234,
        num_packed_rows=3,
        bad_rows=["task.jsonl:4: the completion is empty"],
        sha256=["cd" * 32],
    )


def canned_evaluation(version: int, loss: float, num_exact: int, generated: str) -> pb.Evaluation:
    """An evaluation of a version with one sample."""
    return pb.Evaluation(
        version=version,
        loss=loss,
        perplexity=2.5,
        num_prompts=2,
        num_exact=num_exact,
        samples=[pb.Sample(prompt="def add(a, [b]):", expected="return a + b", generated=generated)],
    )


def canned_fine_tuning(name: str = "task", **changes: Any) -> pb.FineTuning:
    """A finished fine-tuning with every field set."""
    fields: dict[str, Any] = {
        "name": name,
        "state": pb.FINE_TUNING_STATE_FINISHED,
        "reason": "version 12 is the best",
        "base_title": "tiny-llama",
        "base_sha256": "ab" * 32,
        "method": "lora",
        "num_trained_parameters": 36_864,
        "job": canned_job(f"{name}-1", state=jobs_pb2.JOB_STATE_FINISHED, waits=[]),
        "examples": canned_report(),
        "before": canned_evaluation(0, 3.25, 0, "x x x"),
        "after": canned_evaluation(12, 0.5, 1, "return a + b"),
        "best_version": 12,
        "pushed_bytes_per_step": 294_912,
        "recipe_json": json.dumps({"name": name}),
        "created_unix_ms": SUBMITTED_MS,
    }
    fields.update(changes)
    return pb.FineTuning(**fields)


def export_piece(file: str, file_bytes: int, payload: bytes) -> pb.ExportFineTuningResponse:
    """A piece of an exported file."""
    return pb.ExportFineTuningResponse(file=file, file_bytes=file_bytes, payload=payload)


class CannedFineTunings(fine_tuning_pb2_grpc.FineTuningServiceServicer):
    """Answers from its attributes and keeps what it was asked."""

    def __init__(self) -> None:
        self.fine_tunings = [canned_fine_tuning()]
        self.created = canned_fine_tuning("made", state=pb.FINE_TUNING_STATE_TRAINING, reason="as job made-1")
        self.requests: list[Any] = []
        self.uploaded = b""
        self.generation = pb.GetGenerationResponse(max_cache_bytes=1 << 30)
        self.preview: pb.PreviewExamplesResponse | None = None
        self.break_watch_after: list[int] = []
        """Cursors after which a watch breaks, each once."""

    def _find(self, name: str) -> pb.FineTuning:
        for each in self.fine_tunings:
            if name in ("", each.name):
                return each
        raise ConfigError(f"there is no fine-tuning '{name}'; `gradstream finetune ls` lists them")

    async def UploadExamples(self, messages: Any, context: Any) -> pb.UploadExamplesResponse:
        file = ""
        async for message in messages:
            file = file or message.file
            self.uploaded += message.payload
        return pb.UploadExamplesResponse(path=f"/state/uploads/{file}", sha256="ef" * 32)

    async def PreviewExamples(self, request: Any, context: Any) -> pb.PreviewExamplesResponse:
        self.requests.append(request)
        pieces = [
            pb.RenderedPiece(text="def add(a, [b]):", is_target=False),
            pb.RenderedPiece(text="return a + b", is_target=True),
        ]
        example = pb.RenderedExample(origin="task.jsonl:1", pieces=pieces, num_tokens=12, num_targets=5)
        return self.preview or pb.PreviewExamplesResponse(examples=[example], report=canned_report())

    async def CreateFineTuning(self, request: Any, context: Any) -> pb.CreateFineTuningResponse:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            if "/not/there" in request.recipe_json:
                raise DataError("there is no file /not/there; correct data.path, or send the file with --upload")
            self.fine_tunings.insert(0, self.created)
            return pb.CreateFineTuningResponse(
                fine_tuning=canned_fine_tuning("made", state=pb.FINE_TUNING_STATE_PREPARING)
            )
        raise AssertionError

    async def ListFineTunings(self, request: Any, context: Any) -> pb.ListFineTuningsResponse:
        return pb.ListFineTuningsResponse(fine_tunings=self.fine_tunings)

    async def GetGeneration(self, request: Any, context: Any) -> pb.GetGenerationResponse:
        return self.generation

    async def GetFineTuning(self, request: Any, context: Any) -> pb.GetFineTuningResponse:
        async with rpc_errors.answering(context):
            return pb.GetFineTuningResponse(fine_tuning=self._find(request.name))
        raise AssertionError

    async def WatchFineTuning(self, request: Any, context: Any) -> AsyncIterator[pb.WatchFineTuningResponse]:
        yield pb.WatchFineTuningResponse(
            fine_tuning=canned_fine_tuning(request.name, state=pb.FINE_TUNING_STATE_TRAINING, reason="")
        )
        for item in canned_history():
            yield pb.WatchFineTuningResponse(job=item)
            if item.cursor in self.break_watch_after:
                self.break_watch_after.remove(item.cursor)
                from grpc import StatusCode

                await context.abort(StatusCode.UNAVAILABLE, "going down")
        yield pb.WatchFineTuningResponse(fine_tuning=self._find(request.name))

    async def PauseFineTuning(self, request: Any, context: Any) -> pb.PauseFineTuningResponse:
        self.requests.append(request)
        return pb.PauseFineTuningResponse(fine_tuning=self._find(request.name))

    async def ResumeFineTuning(self, request: Any, context: Any) -> pb.ResumeFineTuningResponse:
        self.requests.append(request)
        return pb.ResumeFineTuningResponse(fine_tuning=self._find(request.name))

    async def CancelFineTuning(self, request: Any, context: Any) -> pb.CancelFineTuningResponse:
        self.requests.append(request)
        return pb.CancelFineTuningResponse(fine_tuning=self._find(request.name))

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        words = ["x", " x"] if request.use_base else ["return", " a + b"]
        async with rpc_errors.answering(context):
            if request.prompt == "too long":
                raise ConfigError("the prompt's 70 tokens are more than the model's 64 positions; shorten the prompt")
            for count, word in enumerate(words, 1):
                reason = pb.FINISH_REASON_END_OF_TEXT if count == len(words) else pb.FINISH_REASON_UNSPECIFIED
                yield pb.GenerateResponse(text=word, num_tokens=count, finish_reason=reason)

    async def ExportFineTuning(self, request: Any, context: Any) -> AsyncIterator[pb.ExportFineTuningResponse]:
        self.requests.append(request)
        async with rpc_errors.answering(context):
            if request.HasField("version") and request.version != 12:
                raise CheckpointError(f"task has no checkpoint of version {request.version}; there are: 12")
            yield export_piece("README.md", 4, b"card")
            yield export_piece("adapter_model.safetensors", 6, b"abc")
            yield export_piece("adapter_model.safetensors", 6, b"def")


def serving_fine_tunings(servicer: CannedFineTunings) -> AbstractContextManager[str]:
    """Serve `servicer` on a free port; yield the address."""
    return serving_by(lambda server: fine_tuning_pb2_grpc.add_FineTuningServiceServicer_to_server(servicer, server))
