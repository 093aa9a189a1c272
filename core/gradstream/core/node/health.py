"""A client of gRPC's health protocol, which asks a service if it serves.

`python -m gradstream.core.node.health HOST:PORT ROLE` is the health check of the containers. Each runs it every few
seconds, so this module imports grpc and little else. With the imports of the command line, the health checks of six
idle containers took half a processor.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

import grpc

from gradstream.core.credentials.tokens import DNS_SUFFIX
from gradstream.core.errors import CredentialsError, ProtocolError, UnreachableError

Answer = Literal["SERVING", "NOT_SERVING"]

METHOD = "/grpc.health.v1.Health/Check"
DEFAULT_TIMEOUT_SECONDS = 4.0
# An encoded HealthCheckResponse with status SERVING.
_SERVING = b"\x08\x01"


def ask(
    address: str, role: str, credentials: Path | None = None, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
) -> Answer:
    """Ask the service of a role at `address` (host:port) for its health as a whole.

    `credentials` is a credential directory to show. Raises UnreachableError when nobody answers in time, ProtocolError
    when what answers knows no health, CredentialsError when it refuses the credentials or they cannot be read.
    """
    channel, metadata = _open(address, role, credentials)
    with channel:
        check = channel.unary_unary(METHOD, request_serializer=bytes, response_deserializer=bytes)
        try:
            answer = check(b"", timeout=timeout_seconds, metadata=metadata)
        except grpc.RpcError as error:
            cause = " ".join((error.details() or "no answer").split())  # type: ignore[attr-defined]
            code = error.code()  # type: ignore[attr-defined]
            if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise CredentialsError(cause) from None
            if code is grpc.StatusCode.UNIMPLEMENTED:
                raise ProtocolError(f"{address} knows nothing of health ({cause}); is it gradstream's?") from None
            raise UnreachableError(f"{address} does not answer ({cause}); is it running and the port open?") from None
    return "SERVING" if answer == _SERVING else "NOT_SERVING"


def _open(address: str, role: str, directory: Path | None) -> tuple[grpc.Channel, tuple[tuple[str, str], ...]]:
    """A channel and the metadata for each call, as in gradstream.core.rpc.transport, which is slow to import."""
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if directory is None:
        return grpc.insecure_channel(address, options=options), ()
    try:
        ca, key, cert, token = ((directory / name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem", "token"))
    except OSError as error:
        raise CredentialsError(
            f"the credentials in {directory} cannot be read ({error.filename}: {error.strerror}); `gradstream certs "
            f"issue` makes some"
        ) from None
    options.append(("grpc.ssl_target_name_override", role + DNS_SUFFIX))
    channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options=options)
    return channel, (("authorization", f"Bearer {token.decode('ascii', errors='replace').strip()}"),)


def main(arguments: list[str]) -> int:
    """Print one word or the error; return 0 for SERVING, as container engines expect."""
    directory = os.environ.get("GRADSTREAM_CREDENTIALS")
    try:
        answer = ask(arguments[0], arguments[1], Path(directory) if directory else None)
    except (UnreachableError, ProtocolError, CredentialsError) as error:
        print(f"error: {error}")
        return 1
    print(answer)
    return 0 if answer == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
