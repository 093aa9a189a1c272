"""The calls of the data plane, whose messages are hand-framed bytes."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.proto.v1 import worker_pb2

_SERVICE = "gradstream.proto.v1.ParameterServerService"


_WORKER_SERVICE = "gradstream.proto.v1.WorkerService"


class ParameterServerStub:
    """The client side of ParameterServerService. Push and Pull use raw bytes, the other calls protobuf."""

    def __init__(self, channel: grpc.aio.Channel):
        self.Push = channel.stream_stream(f"/{_SERVICE}/Push", None, pb.PushResponse.FromString)
        self.Pull = channel.unary_stream(f"/{_SERVICE}/Pull", pb.PullRequest.SerializeToString, None)
        self.CompleteStep = channel.unary_unary(
            f"/{_SERVICE}/CompleteStep", pb.CompleteStepRequest.SerializeToString, pb.CompleteStepResponse.FromString
        )
        self.CompleteSlots = channel.unary_unary(
            f"/{_SERVICE}/CompleteSlots", pb.CompleteSlotsRequest.SerializeToString, pb.CompleteSlotsResponse.FromString
        )
        self.GetServerStatus = channel.unary_unary(
            f"/{_SERVICE}/GetServerStatus",
            pb.GetServerStatusRequest.SerializeToString,
            pb.GetServerStatusResponse.FromString,
        )


class WorkerStub:
    """The client side of WorkerService: a stream of raw bytes."""

    def __init__(self, channel: grpc.aio.Channel):
        self.Stream = channel.stream_stream(f"/{_WORKER_SERVICE}/Stream", None, worker_pb2.StageResponse.FromString)


def add_worker(servicer: Any, server: grpc.aio.Server) -> None:
    """Register a servicer of WorkerService whose Stream takes raw bytes."""
    handler = grpc.stream_stream_rpc_method_handler(servicer.Stream, None, worker_pb2.StageResponse.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_WORKER_SERVICE, {"Stream": handler}),))


def add_parameter_server(servicer: Any, server: grpc.aio.Server) -> None:
    """Register a servicer of ParameterServerService whose Push takes and whose Pull returns raw bytes."""
    handlers = {
        "Push": grpc.stream_stream_rpc_method_handler(servicer.Push, None, pb.PushResponse.SerializeToString),
        "Pull": grpc.unary_stream_rpc_method_handler(servicer.Pull, pb.PullRequest.FromString, None),
        "CompleteStep": grpc.unary_unary_rpc_method_handler(
            servicer.CompleteStep, pb.CompleteStepRequest.FromString, pb.CompleteStepResponse.SerializeToString
        ),
        "CompleteSlots": grpc.unary_unary_rpc_method_handler(
            servicer.CompleteSlots, pb.CompleteSlotsRequest.FromString, pb.CompleteSlotsResponse.SerializeToString
        ),
        "GetServerStatus": grpc.unary_unary_rpc_method_handler(
            servicer.GetServerStatus, pb.GetServerStatusRequest.FromString, pb.GetServerStatusResponse.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
