"""Diagnosis of an unreachable peer for causes in credentials or TLS, which gRPC reports only as "unavailable"."""

from __future__ import annotations

import asyncio

from gradstream.core.credentials.tls_diagnosis import Cause, Identity, diagnose_connection
from gradstream.core.errors import CredentialsError
from gradstream.core.rpc.transport import Transport

# The other causes mean that no service of gradstream listens there, which may change by itself.
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
    """The problem of the credentials that prevents a connection to the peer of a role at `address`; None if none does.

    Found by connecting, in a few seconds at most.
    """
    identity = None
    if transport.is_secure:
        credentials = transport.credentials()
        identity = Identity(credentials.ca, credentials.cert, credentials.key)
    host, _, port = address.rpartition(":")
    found = await asyncio.to_thread(diagnose_connection, host, int(port), identity, role)
    return CredentialsError(found.one_line) if found.cause in _OF_CREDENTIALS else None
