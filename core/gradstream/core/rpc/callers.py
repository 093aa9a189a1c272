"""What a call shows of its caller: the certificate of its connection, and its token."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc.aio

from gradstream.core.credentials.store import dns_name
from gradstream.core.credentials.tokens import ROLES
from gradstream.core.rpc.limits import MAX_NODES
from gradstream.core.rpc.transport import AUTHORIZATION, BEARER

Context = grpc.aio.ServicerContext[Any, Any]
MAX_CERTIFICATES = 2 * MAX_NODES
"""Number of callers' certificates that a server remembers."""


@dataclass(frozen=True)
class Shown:
    """The caller's identity that the connection proves. All but `host` are empty without a certificate."""

    role: str
    name: str
    certificate_sha256: str
    """The certificate's hash, in hex."""
    host: str


def token_of(context: Context) -> str:
    """The bearer token of a call; empty when it has none."""
    for key, value in context.invocation_metadata() or ():
        if key == AUTHORIZATION and isinstance(value, str) and value.startswith(BEARER):
            return value[len(BEARER) :]
    return ""


def shown_by(context: Context) -> Shown:
    """The caller's identity that the connection of a call proves."""
    found = context.auth_context()
    names = {name.decode(errors="replace") for name in found.get("x509_subject_alternative_name", ())}
    role = next((role for role in ROLES if dns_name(role) in names), "")
    name = b"".join(found.get("x509_common_name", ())).decode(errors="replace")
    certificate = b"".join(found.get("x509_pem_cert", ()))
    return Shown(role, name, _sha256(certificate) if certificate else "", context.peer().rpartition(":")[0])


@lru_cache(maxsize=MAX_CERTIFICATES)
def _sha256(pem: bytes) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))).hexdigest()
