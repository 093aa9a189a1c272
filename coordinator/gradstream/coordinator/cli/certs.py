"""`gradstream certs`: create a cluster's authority, and issue, renew and revoke credentials with it."""

from __future__ import annotations

import os
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstream.coordinator.cli.app import group
from gradstream.coordinator.cli.options import CredentialsOption, OutputFormat, OutputOption
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.core.credentials.authority import Authority
    from gradstream.core.credentials.store import Credentials
    from gradstream.core.credentials.tokens import Token

app = group("Credentials of a cluster: issue, renew and revoke certificates and tokens.")

# From then on new certificates would end early, with the CA.
CA_WARNING_SECONDS = 400 * 86_400
SOON_SECONDS = 30 * 86_400

AuthorityOption = Annotated[
    Path | None,
    typer.Option(
        "--authority",
        envvar="GRADSTREAM_AUTHORITY",
        metavar="DIR",
        show_default=False,
        help="The authority's directory, which `gradstream certs init` made.",
    ),
]
DaysOption = Annotated[
    int | None,
    typer.Option("--days", metavar="N", min=1, help="How long it is good.", show_default="people 90, services 365"),
]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The authority's directory. Keep it safe.")],
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens",
            metavar="PATH",
            show_default="none: `certs publish` does it",
            help="Publish each change of the token table to this file at once: where the coordinator on this machine, "
            "or on this volume, reads it.",
        ),
    ] = None,
    issue: Annotated[
        list[str] | None,
        typer.Option("--issue", metavar="ROLE=DIR", help="A credential directory to create or renew; repeatable."),
    ] = None,
    every_hours: Annotated[
        float | None,
        typer.Option(
            "--every-hours",
            metavar="N",
            min=0.0,
            envvar="GRADSTREAM_EVERY_HOURS",
            show_default="once",
            help="Keep running and repeat every N hours: credentials are renewed without a restart of any service.",
        ),
    ] = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Create the authority of a cluster, and first credentials.

    Existing and valid credentials are not changed, so this command may run before every start. Missing ones are
    created, and those that expire within 30 days are renewed.
    """
    from gradstream.core.errors import ConfigError

    wanted = [_parse_issue(item, directory) for item in issue or []]
    _ensure(directory, tokens, wanted, output)
    while every_hours is not None:
        time.sleep(3600 * every_hours)
        try:
            _ensure(directory, tokens, wanted, None)
        except (
            ConfigError
        ) as error:  # a full disk or a command that holds the authority may be gone at the next attempt
            terminal.warn(str(error))


def _ensure(directory: Path, tokens: Path | None, wanted: list[tuple[str, Path]], output: OutputFormat | None) -> None:
    """Create or renew authority and credentials if needed; print the result, without `output` only the changes."""
    from gradstream.core.credentials.authority import Authority

    with Authority.init(_path(directory), None if tokens is None else _path(tokens)) as authority:
        rows = []
        for role, place in wanted:
            action, reason = authority.ensure(role, role, place)
            rows.append({"role": role, "directory": str(place), "action": action, "reason": reason})
        _warn_of_ca(authority)
        where = {
            "directory": str(authority.directory),
            "tokens": str(authority.published_path or authority.tokens_path),
        }
    if output is None:
        for row in rows:
            if row["action"] != "kept":
                terminal.say(f"{row['directory']}: {row['role']} {row['action']}: {row['reason']}")
        return
    if output is OutputFormat.json:
        terminal.print_json({"cluster": authority.cluster, **where, "credentials": rows})
        return
    terminal.print_line(
        f"cluster {authority.cluster}: authority in {where['directory']}, tokens in {where['tokens']}", flush=True
    )
    if authority.published_path is None:
        _say_when(authority)
    if rows:
        terminal.print_table(["ROLE", "CREDENTIAL", "DIRECTORY", "WHY"], [_cells(row) for row in rows])
    else:
        terminal.hint(f"first credential: gradstream certs issue admin --name NAME --authority {where['directory']}")


@app.command()
def issue(
    role: Annotated[
        str,
        typer.Argument(
            metavar="ROLE", help="viewer, submitter or admin; worker, server, coordinator or fine-tuning for services."
        ),
    ],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Whose it is.")],
    authority: AuthorityOption = None,
    directory: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", show_default=False, help="Write a credential directory, not a pack."),
    ] = None,
    days: DaysOption = None,
) -> None:
    """Issue a credential: as a pack on stdout, for `gradstream login`, or as a directory."""
    with _open(authority) as opened:
        made = opened.issue(role, name, days, None if directory is None else _path(directory))
        _warn_of_ca(opened)
    _say_when(opened)
    if directory is None:
        _print_pack(made)
        return
    terminal.print_line(made.source)
    terminal.hint(f"{role} '{name}', good until {terminal.format_time(_time(made.expires_at))}")


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A credential directory.")],
) -> None:
    """Print a credential directory as a pack, for `gradstream login`.

    If the credentials are not valid: exit code 2, and one line with the reason.
    """
    from gradstream.core.credentials.store import load

    found = load(_path(directory), time.time())
    for warning in found.warnings:
        terminal.warn(warning)
    _print_pack(found)


@app.command()
def ls(authority: AuthorityOption = None, output: OutputOption = OutputFormat.table) -> None:
    """List the issued tokens, oldest first.

    Expired and revoked tokens are forgotten after 30 days.
    """
    now = time.time()
    with _open(authority, read_only=True) as opened:
        tokens = opened.tokens()
        _warn_of_ca(opened)
    if output is OutputFormat.json:
        terminal.print_json([_token_dict(token, now) for token in tokens])
        return
    if not tokens:
        terminal.say("no tokens yet; `gradstream certs issue ROLE --name NAME` makes one")
        return
    terminal.print_table(
        ["ID", "ROLE", "NAME", "ISSUED", "EXPIRES", "STATE"],
        [
            (
                token.id,
                token.role,
                token.name,
                terminal.format_time(_time(token.issued_at)),
                terminal.format_time(_time(token.expires_at)),
                _state_text(token, now),
            )
            for token in tokens
        ],
    )


@app.command()
def revoke(
    name_or_id: Annotated[
        str, typer.Argument(metavar="NAME_OR_ID", help="A token's id, or a name for all its tokens.")
    ],
    authority: AuthorityOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Revoke a token, or all tokens of a name.

    Services refuse the token as soon as they have the new token table, which `certs publish` sends.
    """
    with _open(authority) as opened:
        revoked = opened.revoke(name_or_id)
    if revoked:
        _say_when(opened)
    if any(token.role in ("coordinator", "fine-tuning") for token in revoked):
        terminal.warn(
            "people's commands trust any certificate of the CA: until the CA is rotated (`gradstream certs rotate "
            "--ca`), they would still talk to a holder of this service's key"
        )
    if output is OutputFormat.json:
        terminal.print_json([_token_dict(token, time.time()) for token in revoked])
        return
    for token in revoked:
        terminal.print_line(f"revoked token {token.id} of {token.holder}")
    if not revoked:
        terminal.say(f"no token of '{name_or_id}' was good any more")


@app.command()
def rotate(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", show_default=False, help="Credential directories to renew."),
    ] = None,
    authority: AuthorityOption = None,
    ca: Annotated[
        bool, typer.Option("--ca", help="Make a new CA first; the old one stays trusted until --finish.")
    ] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="With --ca: drop the old CA, once all credentials are renewed.")
    ] = False,
    days: Annotated[
        int | None, typer.Option("--days", metavar="N", min=1, help="How long they are good.", show_default="as before")
    ] = None,
    grace_minutes: Annotated[
        int,
        typer.Option(
            "--grace-minutes",
            metavar="N",
            min=0,
            help="How long the old tokens stay valid; with 0, a service that has not read the new ones yet is refused.",
        ),
    ] = 60,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Renew credential directories in place: a new certificate and token each.

    Services load them without a restart, once the token table is published. The old tokens stay valid for
    --grace-minutes.
    """
    from gradstream.core.errors import ConfigError

    if finish and not ca:
        raise ConfigError("--finish ends a rotation of the CA; add --ca")
    if not directories and not ca:
        raise ConfigError("nothing to renew; name credential directories, or add --ca for a new CA")
    now = time.time()
    rows: list[dict[str, Any]] = []
    with _open(authority) as opened:
        if ca and finish:
            opened.finish_ca_rotation()
        elif ca:
            opened.rotate_ca()
        for directory in map(_path, directories or []):
            made = opened.refresh_ca(directory) if finish else opened.renew(directory, grace_minutes * 60, days)
            rows.append({"directory": str(directory), "role": made.role, "name": made.name, **_until(made)})
        waiting = opened.awaited()
        if not ca:
            _warn_of_ca(opened)
    if directories and not finish:
        _say_when(opened)
    if output is OutputFormat.json:
        terminal.print_json({"credentials": rows, "awaited": [_token_dict(token, now) for token in waiting]})
        return
    for row in rows:
        done = "trusts only the new CA" if finish else "renewed, good"
        until = terminal.format_time(datetime.fromisoformat(row["expires_at"]))
        terminal.print_line(f"{row['directory']}: {row['role']} '{row['name']}' {done} until {until}")
    if ca and finish:
        terminal.say("the old CA is dropped")
    elif waiting:
        holders = ", ".join(f"{token.holder} ({token.id})" for token in waiting)
        terminal.say(f"before `gradstream certs rotate --ca --finish`, renew or revoke: {holders}")
    elif ca or opened.is_rotating:
        terminal.say("all credentials are of the new CA; end the rotation with `gradstream certs rotate --ca --finish`")


@app.command()
def publish(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="HOST:PORT of the coordinator, or a file or directory where it reads (a directory gets tokens.json).",
        ),
    ],
    authority: AuthorityOption = None,
    credentials: CredentialsOption = None,
) -> None:
    """Send the token table to the coordinator. Issued, renewed and revoked tokens then take effect.

    With HOST:PORT the table is sent over mTLS, with an admin's credentials. The CA's signature proves that it comes
    from the authority.
    """
    from gradstream.client import Client

    with _open(authority, read_only=True) as opened:
        if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}", target):
            place = opened.publish(_path(Path(target)))
            terminal.say(f"table {opened.serial} with {len(opened.tokens())} tokens is in {place}; {_READS}")
            return
        table, signature, certificate = opened.signed()
    with Client(target, credentials=credentials) as client:
        serial, num_tokens = client.publish_tokens(table, signature, certificate)
    terminal.say(
        f"table {serial} with {num_tokens} tokens is in force at the coordinator {target}; the other services follow "
        f"within about 2 seconds"
    )


_READS = "a coordinator that reads this file loads it within a second, and the other services a second later"


def _say_when(authority: Authority) -> None:
    """Print when and where a change takes effect."""
    if authority.published_path is None:
        terminal.say(
            "takes effect once it is published: gradstream certs publish HOST:PORT (the coordinator), or a path where "
            f"it reads, with --authority {authority.directory}"
        )
        return
    terminal.say(f"published to {authority.published_path}; {_READS}")


def _open(directory: Path | None, read_only: bool = False) -> Authority:
    from gradstream.core.credentials.authority import Authority
    from gradstream.core.errors import ConfigError

    if directory is None:
        raise ConfigError("which authority? add --authority DIR, or set GRADSTREAM_AUTHORITY")
    return Authority.open(_path(directory), read_only=read_only)


def _path(path: Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _parse_issue(item: str, authority: Path) -> tuple[str, Path]:
    """Parse ROLE=DIR; return (role, directory)."""
    from gradstream.core.credentials.tokens import ROLES
    from gradstream.core.errors import ConfigError, nearest

    role, equals, directory = item.partition("=")
    if not equals or not directory:
        raise ConfigError(f"--issue '{item}' is not of the form ROLE=DIR, like admin=credentials/admin")
    if role not in ROLES:
        raise ConfigError(f"--issue '{item}': no such role{nearest(role, ROLES) or '; roles are ' + ', '.join(ROLES)}")
    if _path(Path(directory)) == _path(authority):
        raise ConfigError(f"--issue '{item}' is the authority's own directory; give each credential its own")
    return role, _path(Path(directory))


def _print_pack(credentials: Credentials) -> None:
    from gradstream.core.credentials.store import to_pack

    terminal.print_line(to_pack(credentials))
    if sys.stdout.isatty():
        terminal.warn(
            f"this is the secret of {credentials.role} '{credentials.name}'; better pipe it: | gradstream login ADDRESS"
        )


def _warn_of_ca(authority: Authority) -> None:
    if authority.ca_expires_at - time.time() < CA_WARNING_SECONDS:
        expires = terminal.format_time(_time(authority.ca_expires_at))
        terminal.warn(
            f"the CA expires on {expires}, and no credential outlives it; renew it: gradstream certs rotate --ca"
        )


def _until(credentials: Credentials) -> dict[str, str]:
    return {"expires_at": _time(credentials.expires_at).isoformat()}


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _state(token: Token, now: float) -> str:
    if token.revoked_at is not None:
        return "revoked"
    return "good" if token.is_good(now) else "expired"


def _state_text(token: Token, now: float) -> Any:
    state = _state(token, now)
    if state == "revoked":
        return terminal.styled(f"revoked {terminal.format_time(_time(token.revoked_at or 0))}", "red")
    if state == "expired":
        return terminal.styled("expired", "yellow")
    left = token.expires_at - now
    return terminal.styled(f"good, {terminal.format_duration(left)} left", "green" if left > SOON_SECONDS else "yellow")


def _token_dict(token: Token, now: float) -> dict[str, Any]:
    return {
        "id": token.id,
        "role": token.role,
        "name": token.name,
        "issued_at": _time(token.issued_at).isoformat(),
        "expires_at": _time(token.expires_at).isoformat(),
        "revoked_at": None if token.revoked_at is None else _time(token.revoked_at).isoformat(),
        "state": _state(token, now),
    }


def _cells(row: dict[str, str]) -> tuple[str, str, str, str]:
    return row["role"], row["action"], row["directory"], row["reason"]
