"""Why a peer cannot be reached, where credentials or TLS are the reason: gRPC says only that it is unavailable."""

from __future__ import annotations

import asyncio

from gradstream.core.credentials.tls_diagnosis import Cause, Identity, diagnose_connection
from gradstream.core.errors import CredentialsError
from gradstream.core.rpc.transport import Transport

# The others mean that nothing of ours listens there, which may change by itself.
_OF_CREDENTIALS = frozenset(
    (
        Cause.PEER_IN_CLEAR,
        Cause.PEER_WANTS_TLS,
        Cause.OWN_CREDENTIALS,
        Cause.OWN_EXPIRED,
        Cause.OWN_REFUSED,
        Cause.PEER_EXPIRED,
        Cause.NOT_YET_VALID,
        Cause.WRONG_CA,
        Cause.WRONG_ROLE,
    )
)


async def why_unreachable(address: str, role: str, transport: Transport) -> CredentialsError | None:
    """What of the credentials keeps one from the peer of that role at `address`, found by trying; None when it is not
    them. Takes a few seconds at most."""
    identity = None
    if transport.is_secure:
        credentials = transport.credentials()
        identity = Identity(credentials.ca, credentials.cert, credentials.key)
    host, _, port = address.rpartition(":")
    found = await asyncio.to_thread(diagnose_connection, host, int(port), identity, role)
    return CredentialsError(found.one_line) if found.cause in _OF_CREDENTIALS else None
