"""The errors that gradstream shows to people, in one tree.

    GradstreamError
    ├── ConfigError            a recipe, an option or a path is wrong
    ├── DataError              a data set or a data shard is missing, corrupt or does not fit the model
    ├── CheckpointError        a checkpoint is missing, truncated or altered
    ├── PlanError              no plan can be made with the nodes at hand
    ├── ProtocolError          a peer's message breaks the protocol
    │   └── StaleEpochError    a peer's message belongs to a plan that has been replaced
    ├── AccessError            credentials do not allow the request
    │   └── CredentialsError   credentials are missing, expired, revoked or another cluster's
    ├── BusyError              a caller has reached a limit on what it may use at once
    └── UnreachableError       a peer does not answer

A message is one line that names the cause and the cure. `exit_code` is the exit code of the CLI, `status` the gRPC
status of a call.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

import grpc

MAX_MESSAGE_CHARACTERS = 2000
MAX_COMPARED_CHARACTERS = 100
MAX_COMPARED = 1000
"""Number of candidates among which `nearest` searches."""


class GradstreamError(Exception):
    """An error with a message for people.

    `str(error)` is one plain line, also when the message quotes text of a peer or a file.
    """

    exit_code = 1
    status = grpc.StatusCode.INTERNAL

    def __init__(self, message: str = ""):
        super().__init__(plain_line(message))


class ConfigError(GradstreamError):
    """A recipe, an option or a path is wrong."""

    exit_code = 2
    status = grpc.StatusCode.INVALID_ARGUMENT


class DataError(GradstreamError):
    """A data set or data shard is missing, corrupt or does not fit the model."""

    exit_code = 3
    status = grpc.StatusCode.FAILED_PRECONDITION


class CheckpointError(GradstreamError):
    """A checkpoint is missing, truncated or altered."""

    exit_code = 4
    status = grpc.StatusCode.FAILED_PRECONDITION


class PlanError(GradstreamError):
    """No plan can be made with the nodes at hand."""

    exit_code = 5
    status = grpc.StatusCode.FAILED_PRECONDITION


class ProtocolError(GradstreamError):
    """A peer's message breaks the protocol. No part of the message was used."""

    exit_code = 6
    status = grpc.StatusCode.INVALID_ARGUMENT


class StaleEpochError(ProtocolError):
    """A peer's message belongs to a plan that has been replaced."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class AccessError(GradstreamError):
    """The caller's credentials do not allow the request."""

    exit_code = 9
    status = grpc.StatusCode.PERMISSION_DENIED


class CredentialsError(AccessError):
    """Credentials are missing, damaged, expired, revoked or another cluster's."""

    status = grpc.StatusCode.UNAUTHENTICATED


class BusyError(GradstreamError):
    """A caller has reached a limit on what it may use at once; a later retry can succeed."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnreachableError(GradstreamError):
    """A peer does not answer."""

    exit_code = 7
    status = grpc.StatusCode.UNAVAILABLE


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the candidate nearest to `word`, or "" when none is near."""
    if len(word) > MAX_COMPARED_CHARACTERS:
        return ""  # so long a word is no typing error, and the comparison would take long
    known = [other for other in islice(candidates, MAX_COMPARED) if len(other) <= 2 * MAX_COMPARED_CHARACTERS]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def one_line(error: BaseException) -> str:
    """The error's message on one line, for people, without a stack trace.

    The type's name stands before the message of an error that is not gradstream's own.
    """
    text = str(error)
    if isinstance(error, GradstreamError):
        return plain_line(text)
    return plain_line(f"{type(error).__name__}: {text}") if text.strip() else type(error).__name__


def plain_line(text: str) -> str:
    """`text` on one line, printable and short.

    Control characters and halves of surrogate pairs, which terminals and protobuf cannot take, are replaced. The middle
    of a long text is left out, because gRPC drops a status of more than 8 KiB.
    """
    if len(text) > 4 * MAX_MESSAGE_CHARACTERS:
        text = f"{text[: 2 * MAX_MESSAGE_CHARACTERS]} {text[-2 * MAX_MESSAGE_CHARACTERS :]}"
    line = " ".join(text.split())
    if not line.isprintable():
        line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    # gRPC writes each byte of a non-ASCII character as three characters.
    num_foreign = 0 if line.isascii() else sum(not character.isascii() for character in line)
    most = MAX_MESSAGE_CHARACTERS if num_foreign <= MAX_MESSAGE_CHARACTERS // 8 else MAX_MESSAGE_CHARACTERS // 4
    return line if len(line) <= most else f"{line[: most * 2 // 3]} … {line[3 - most // 3 :]}"
