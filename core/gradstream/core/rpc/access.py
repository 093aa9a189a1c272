"""Access rules: roles, the rule beside each call's proto, and the decision if a role may make a call.

A role is a word here ("worker"), as in certificates and tokens. Each role of people includes the ones below it, and a
rule names the lowest role that may make the call. The fine-tuning service works for people and may make the calls of a
submitter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

from google.protobuf.descriptor import FileDescriptor

from gradstream.core.credentials.tokens import ROLES
from gradstream.proto.v1 import (
    access_pb2,
    coordinator_pb2,
    fine_tuning_pb2,
    jobs_pb2,
    parameter_server_pb2,
    probe_pb2,
    worker_pb2,
)

FILES: tuple[FileDescriptor, ...] = tuple(
    module.DESCRIPTOR
    for module in (coordinator_pb2, fine_tuning_pb2, jobs_pb2, parameter_server_pb2, probe_pb2, worker_pb2)
)
"""The protos that have services."""

VIEWER, SUBMITTER, ADMIN = "viewer", "submitter", "admin"
WORKER, SERVER, COORDINATOR, FINE_TUNING = "worker", "server", "coordinator", "fine-tuning"

# Each role may also make the calls of these roles.
_INCLUDES: Mapping[str, tuple[str, ...]] = {
    SUBMITTER: (VIEWER,),
    ADMIN: (SUBMITTER, VIEWER),
    FINE_TUNING: (SUBMITTER, VIEWER),
}
_ROLE_OF_WIRE = {
    access_pb2.ROLE_VIEWER: VIEWER,
    access_pb2.ROLE_SUBMITTER: SUBMITTER,
    access_pb2.ROLE_ADMIN: ADMIN,
    access_pb2.ROLE_WORKER: WORKER,
    access_pb2.ROLE_SERVER: SERVER,
    access_pb2.ROLE_COORDINATOR: COORDINATOR,
    access_pb2.ROLE_FINE_TUNING: FINE_TUNING,
}


@dataclass(frozen=True)
class Rule:
    """The roles that may make a call; `audited` calls are recorded in the audit log."""

    roles: frozenset[str]
    audited: bool = False


METRICS = "/metrics"
"""The path of a role's metrics, which are no call of a proto."""

# Rules for what has no `access` option: the services of other protos, and the metrics.
_FOREIGN = {
    METRICS: Rule(frozenset((VIEWER,))),
    "/grpc.health.v1.Health/": Rule(frozenset(ROLES)),
    "/grpc.reflection.v1alpha.ServerReflection/": Rule(frozenset((ADMIN,))),
}


@dataclass(frozen=True)
class Caller:
    """The caller of a call, by certificate and token."""

    name: str
    role: str
    peer: str
    """The address from which the call comes."""

    def __str__(self) -> str:
        return f"{self.name} ({self.role})"


caller: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""The caller of the call that is being answered; None on a server without credentials."""


def by_caller() -> str:
    """` by NAME (ROLE)` for the call that is being answered, for events; empty on a server without credentials."""
    found = caller.get()
    return f" by {found}" if found is not None else ""


@cache
def rules() -> Mapping[str, Rule]:
    """The rule of each call, by its full method ("/package.Service/Call"). Calls without one are left out."""
    found = {}
    for method, option in _methods():
        roles = frozenset(_ROLE_OF_WIRE[role] for role in option.roles if role in _ROLE_OF_WIRE)
        if roles:
            found[method] = Rule(roles, option.audited)
    return found


def methods() -> list[str]:
    """Every call of gradstream's own services, with or without a rule."""
    return [method for method, _ in _methods()]


def rule_of(method: str) -> Rule | None:
    """The rule of a call; None when it has none, so that nobody may make it."""
    rule = rules().get(method)
    if rule is None:
        rule = next((rule for prefix, rule in _FOREIGN.items() if method.startswith(prefix)), None)
    return rule


def may(role: str, method: str) -> tuple[bool, str]:
    """Decide if a role may make a call; return the decision, and its reason in one line."""
    rule = rule_of(method)
    call = method.rpartition("/")[2]
    if rule is None:
        return False, f"{call} has no rule and is open to nobody; add the option access to it in its proto"
    if rule.roles & {role, *_INCLUDES.get(role, ())}:
        return True, f"{call} is open to {_listed(rule)}"
    return False, f"{call} is for {_listed(rule)}, and these credentials are of a {role}; ask an admin for others"


def _listed(rule: Rule) -> str:
    words = [
        f"{role}s and above" if role in (VIEWER, SUBMITTER) else f"{role}s" for role in ROLES if role in rule.roles
    ]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _methods() -> Iterator[tuple[str, access_pb2.Access]]:
    for file in FILES:
        for service in file.services_by_name.values():
            for method in service.methods:
                option = method.GetOptions().Extensions[access_pb2.access]
                yield f"/{service.full_name}/{method.name}", option
