"""Diagnosis of a failed connection: one cause and one cure, found by connecting step by step.

gRPC reports every cause as an unavailable peer. The diagnosis makes each step by itself with sockets and Python's ssl,
with a time-out: it resolves the name, connects to the port, finds out which protocol the peer speaks, verifies the
peer's certificate, and waits for the peer's answer to our certificate. All calls block; an event loop makes them in a
thread.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gradstream.core.credentials.certificate_facts import CertificateFacts, read_certificates, read_der
from gradstream.core.credentials.tokens import utc

TIMEOUT_SECONDS = 3.0
ANSWER_SECONDS = 1.0
"""Time after which a peer that has sent nothing counts as silent."""

# The first bytes of every HTTP/2 connection, hence of gRPC: the preface and empty settings.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


class Cause(StrEnum):
    """Causes of a failed connection."""

    NONE = "none"
    BAD_ADDRESS = "bad-address"
    HOST_UNKNOWN = "host-unknown"
    REFUSED = "refused"
    TIMED_OUT = "timed-out"
    NO_ROUTE = "no-route"
    SILENT = "silent"
    FOREIGN = "foreign"
    PEER_IN_CLEAR = "peer-in-clear"
    PEER_WANTS_TLS = "peer-wants-tls"
    OWN_CREDENTIALS = "own-credentials"
    OWN_EXPIRED = "own-expired"
    OWN_REFUSED = "own-refused"
    PEER_EXPIRED = "peer-expired"
    NOT_YET_VALID = "not-yet-valid"
    WRONG_CA = "wrong-ca"
    WRONG_ROLE = "wrong-role"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of a diagnosis. Cause NONE means that gRPC works. `certificate` is the peer's, if it showed one."""

    cause: Cause
    text: str
    cure: str = ""
    certificate: CertificateFacts | None = None

    @property
    def ok(self) -> bool:
        """Whether the connection works."""
        return self.cause is Cause.NONE

    @property
    def one_line(self) -> str:
        """Cause and cure."""
        return f"{self.text}; {self.cure}" if self.cure else self.text


@dataclass(frozen=True, slots=True)
class Identity:
    """The certificate and key that this side shows, and the CA that it trusts, as PEM texts.

    Without a certificate this side trusts `ca` and shows nothing.
    """

    ca: bytes
    cert: bytes = b""
    key: bytes = b""


def diagnose_connection(
    host: str,
    port: int,
    identity: Identity | None = None,
    role: str = "",
    now: float | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Diagnosis:
    """Connect to a gRPC server at `host`:`port` as gradstream does; return the cause if the connection fails.

    `identity` is None for a connection in the clear. `role` is the role that the peer's certificate must have; empty
    for any. `now` is Unix time in seconds. Blocks for a few times `timeout_seconds` at most.
    """
    now = time.time() if now is None else now
    found = _reach(host, port, timeout_seconds)
    if found is not None:
        return found
    peer = _Peer(host, port, role, now, timeout_seconds)
    if identity is None:
        return peer.in_clear()
    return check_own(identity, now) or peer.with_tls(identity)


def check_own(identity: Identity, now: float) -> Diagnosis | None:
    """Check this side's own certificates; return what is wrong, or None."""
    mend = "issue it again: `gradstream certs issue`, or `gradstream certs rotate`"
    for what, pem in (("the CA certificate (ca.pem)", identity.ca), ("our certificate (cert.pem)", identity.cert)):
        if not pem and pem is identity.cert:
            continue
        try:
            newest = max(read_certificates(pem), key=lambda facts: facts.not_after)
        except ValueError:
            return Diagnosis(Cause.OWN_CREDENTIALS, f"{what} is no certificate", mend)
        if now >= newest.not_after:
            return Diagnosis(Cause.OWN_EXPIRED, f"{what} expired on {utc(newest.not_after)}", mend)
        if now < newest.not_before:
            return Diagnosis(
                Cause.NOT_YET_VALID,
                f"{what} is valid from {utc(newest.not_before)} on, and it is {utc(now)} by the clock here",
                "set this machine's clock",
            )
    return None


def _reach(host: str, port: int, timeout_seconds: float) -> Diagnosis | None:
    """Try a TCP connection; return why there is none, or None if there is one."""
    if not host or not 0 < port < 65536:
        return Diagnosis(
            Cause.BAD_ADDRESS, f"'{host}:{port}' is no address", "write it as host:port, like 10.0.0.1:7000"
        )
    if not _is_known(_bare(host), timeout_seconds):
        return Diagnosis(
            Cause.HOST_UNKNOWN,
            f"the host name '{host}' is unknown here",
            "check its spelling, or use the host's IP address",
        )
    try:
        with socket.create_connection((_bare(host), port), timeout_seconds):
            return None
    except TimeoutError:
        return Diagnosis(
            Cause.TIMED_OUT,
            f"{host} does not answer on port {port} within {timeout_seconds:g} s",
            f"check that the machine is up, and that no firewall drops port {port}",
        )
    except ConnectionRefusedError:
        return Diagnosis(
            Cause.REFUSED,
            f"nothing listens on port {port} of {host}",
            "start the service, publish its port, or have it listen on an address that others can reach (--listen)",
        )
    except OSError as error:
        return Diagnosis(
            Cause.NO_ROUTE,
            f"{host} cannot be reached ({error.strerror or error})",
            "check the network between the two machines",
        )


def _is_known(host: str, timeout_seconds: float) -> bool:
    """Whether a name can be resolved in time. Without the time-out, a silent name server would block for long."""
    found: list[object] = []

    def look_up() -> None:
        try:
            found.extend(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            pass

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return bool(found)


class _Peer:
    """Connections to one peer that listens."""

    def __init__(self, host: str, port: int, role: str, now: float, timeout_seconds: float):
        self._address = f"{host}:{port}"
        self._where = (_bare(host), port)
        self._role = role
        self._server_name = f"{role}.gradstream" if role else ""
        self._now = now
        self._timeout_seconds = timeout_seconds

    # ---- in the clear ----------------------------------------------------------------------------------------------

    def in_clear(self) -> Diagnosis:
        """Diagnose a connection without credentials."""
        first = self._answer_in_clear()
        kind = kind_of(first)
        if kind == "gRPC":
            return Diagnosis(Cause.NONE, f"{self._address} answers")
        shown = self._shown_certificate() if kind in ("TLS", "") else None
        if kind == "TLS" or shown is not None:
            return Diagnosis(
                Cause.PEER_WANTS_TLS,
                f"{self._address} wants TLS, and no credentials were given for it",
                "store them with `gradstream login`, or name their directory in GRADSTREAM_CREDENTIALS (for a role: "
                "--credentials DIR)",
                shown,
            )
        return self._foreign(first, kind)

    def _answer_in_clear(self) -> bytes | None:
        """The first bytes of the peer's answer to gRPC's preface; None when the peer is silent."""
        try:
            with socket.create_connection(self._where, self._timeout_seconds) as connection:
                connection.settimeout(ANSWER_SECONDS)
                connection.sendall(_HELLO)
                return connection.recv(64)
        except TimeoutError:
            return None
        except OSError:
            return b""

    def _foreign(self, first: bytes | None, kind: str) -> Diagnosis:
        if kind:
            does = f"speaks {kind}"
        elif first is None:
            does = "accepts connections and says nothing"
        else:
            does = "answers in a protocol that is not gRPC" if first else "closes connections at once"
        return Diagnosis(
            Cause.FOREIGN if kind or first else Cause.SILENT,
            f"what listens on {self._address} is not gradstream: it {does}",
            "check the port; the coordinator's is 7000 unless --listen says otherwise",
        )

    # ---- with TLS --------------------------------------------------------------------------------------------------

    def with_tls(self, identity: Identity) -> Diagnosis:
        """Diagnose a connection with credentials that `check_own` has passed."""
        try:
            context = _context(identity)
        except (ssl.SSLError, ValueError, OSError):
            return Diagnosis(
                Cause.OWN_CREDENTIALS,
                "our certificate and key (cert.pem, key.pem) do not match or are malformed",
                "issue them again: `gradstream certs issue`, or copy both again",
            )
        context.check_hostname = bool(self._server_name)
        try:
            with (
                socket.create_connection(self._where, self._timeout_seconds) as raw,
                context.wrap_socket(raw, server_hostname=self._server_name or None) as connection,
            ):
                shown = connection.getpeercert(binary_form=True)
                return self._after_handshake(connection, read_der(shown) if shown else None)
        except ssl.SSLCertVerificationError as error:
            return self._not_verified(error, identity)
        except OSError as error:
            return self._no_handshake(error)

    def _after_handshake(self, connection: ssl.SSLSocket, certificate: CertificateFacts | None) -> Diagnosis:
        """Speak gRPC on a new TLS connection. In TLS 1.3 the peer verifies our certificate after our handshake."""
        connection.settimeout(ANSWER_SECONDS)
        try:
            connection.sendall(_HELLO)
            first: bytes | None = connection.recv(64)
        except TimeoutError:
            first = None
        except OSError as error:
            return self._refused(error, certificate)
        if kind_of(first) == "gRPC":
            return Diagnosis(Cause.NONE, f"{self._address} answers, as {_title(certificate)}", "", certificate)
        if first == b"" and connection.selected_alpn_protocol() == "h2":
            return self._refused(None, certificate)
        return self._foreign(first, "TLS, but not gRPC" if first is None else kind_of(first))

    def _refused(self, error: OSError | None, certificate: CertificateFacts | None) -> Diagnosis:
        """The diagnosis for a peer that closed the connection because it refuses our certificate."""
        reason = str(getattr(error, "reason", "") or "").lower()
        why = ""
        for part, words in (
            ("certificate_required", ": it wants one"),
            ("unknown_ca", ": it trusts another CA"),
            ("certificate_expired", ": it says that the certificate has expired"),
            ("bad_certificate", ": it says that the certificate is malformed"),
        ):
            if part in reason:
                why = words
        return Diagnosis(
            Cause.OWN_REFUSED,
            f"{self._address} refuses our certificate{why}",
            "use credentials that its cluster issued (`gradstream certs issue`), and compare the two clocks",
            certificate,
        )

    def _no_handshake(self, error: OSError) -> Diagnosis:
        """Diagnose a failed handshake: the peer showed no certificate, or it refused ours."""
        reason = str(getattr(error, "reason", "") or "")
        if "ALERT" in reason and self._shown_certificate() is not None:
            return self._refused(error, self._shown_certificate())
        first = self._answer_in_clear()
        kind = kind_of(first)
        if kind == "gRPC":
            return Diagnosis(
                Cause.PEER_IN_CLEAR,
                f"{self._address} speaks in the clear, and credentials were given for TLS",
                "start that role with --credentials DIR; only on a machine of your own call it without yours",
            )
        return self._foreign(first, "" if kind == "TLS" else kind)

    def _not_verified(self, error: ssl.SSLCertVerificationError, identity: Identity) -> Diagnosis:
        shown = self._shown_certificate()
        whose = f"{self._address} shows the certificate of {_title(shown)}"
        # OpenSSL's X509_V_ERR_*.
        expired, not_yet, wrong_name = error.verify_code == 10, error.verify_code == 9, error.verify_code == 62
        if expired and shown is not None:
            return Diagnosis(
                Cause.PEER_EXPIRED,
                f"{whose}, which expired on {utc(shown.not_after)}; the clock here says {utc(self._now)}",
                "renew it where the service runs: `gradstream certs rotate`",
                shown,
            )
        if not_yet and shown is not None:
            return Diagnosis(
                Cause.NOT_YET_VALID,
                f"{whose}, which is valid from {utc(shown.not_before)} on; the clock here says {utc(self._now)}",
                "set the clock of this machine, or of the one that issued it",
                shown,
            )
        if wrong_name:
            return Diagnosis(
                Cause.WRONG_ROLE,
                f"{whose}, not that of a {self._role}",
                "check the address; each service has its own",
                shown,
            )
        ours = ", ".join(sorted({facts.cluster or facts.name for facts in read_certificates(identity.ca)}))
        theirs = (shown.issuer_cluster or shown.issuer) if shown is not None else ""
        if theirs and theirs != ours:
            text = f"{whose}, signed by the CA of {theirs}; our ca.pem is the CA of {ours}"
        else:
            text = f"{whose}, signed by another CA than our ca.pem, which has the same name"
        return Diagnosis(
            Cause.WRONG_CA,
            text,
            "use credentials of that cluster, or, if its CA was renewed, have yours issued again",
            shown,
        )

    def _shown_certificate(self) -> CertificateFacts | None:
        """The peer's certificate, not verified; None when the peer does not speak TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        try:
            with (
                socket.create_connection(self._where, self._timeout_seconds) as raw,
                context.wrap_socket(raw, server_hostname=self._server_name or None) as connection,
            ):
                shown = connection.getpeercert(binary_form=True)
                return read_der(shown) if shown else None
        except (OSError, ValueError):
            return None


def kind_of(first: bytes | None) -> str:
    """The protocol of a peer that answers gRPC's preface with the bytes `first`; empty when it is not known."""
    if not first:
        return ""
    if len(first) >= 9 and first[3] == 4 and first[5:9] == bytes(4):
        return "gRPC"
    # Some servers answer an unknown HTTP version with a page and no status line.
    if first.startswith(b"HTTP/") or first[:5].lower() in (b"<!doc", b"<html"):
        return "HTTP/1"
    if first.startswith(b"SSH-"):
        return "SSH"
    if first[0] in (0x15, 0x16) and first[1:2] == b"\x03":
        return "TLS"
    return ""


def _title(certificate: CertificateFacts | None) -> str:
    return certificate.title if certificate is not None else "nobody"


def _bare(host: str) -> str:
    return host.removeprefix("[").removesuffix("]")


def _context(identity: Identity) -> ssl.SSLContext:
    """A TLS context with the settings of gRPC. Raises OSError (SSLError too) or ValueError for malformed files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=identity.ca.decode("ascii"))
    if identity.cert:
        # ssl takes only paths; only this user may enter the directory (0700).
        with tempfile.TemporaryDirectory(prefix="gradstream-") as directory:
            path = Path(directory) / "both.pem"
            path.touch(mode=0o600)
            path.write_bytes(identity.key + b"\n" + identity.cert)
            context.load_cert_chain(path)
    return context
