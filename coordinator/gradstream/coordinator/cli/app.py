"""The command tree, and the handling of errors.

The import of typer takes 0.1 s, that of the rest (grpc, pydantic, rich, torch) much longer. So the tree is a table of
module names: `gradstream --help` reads the table, and a command's module is imported when the command is used.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
import typer.core
import typer.main

from gradstream.coordinator.cli.examples import epilog
from gradstream.coordinator.cli.pipes import EXIT_CODE, ReaderLeftError, watched_output

EPILOG = (
    "Exit codes: 0 done, 1 other error, 2 wrong recipe, option or path, or an extra that is not installed, 3 data, "
    "4 checkpoint, 5 no plan possible, 6 protocol, 7 coordinator or fine-tuning service unreachable, 8 the job or "
    "fine-tuning failed, 9 credentials, 130 Ctrl-C. "
    "GRADSTREAM_COORDINATOR sets the coordinator's address, GRADSTREAM_FINE_TUNING the fine-tuning service's, "
    "GRADSTREAM_CREDENTIALS names a directory of credentials, GRADSTREAM_DEBUG=1 shows stack traces."
)

# Name, module below gradstream.coordinator.cli, attribute (a function, or a typer.Typer for a group), one line of help.
COMMANDS: tuple[tuple[str, str, str, str], ...] = (
    ("init", "init", "init", "Write a first recipe that fits your text and machines."),
    ("dev", "dev", "dev", "Train a recipe here: start a cluster on this machine, run the job, show the result."),
    ("submit", "jobs", "submit", "Submit a recipe to a cluster."),
    ("watch", "jobs", "watch", "Show a job's progress until it ends; a fine-tuning's by its name."),
    ("plan", "plan", "plan", "Forecast a recipe's cost before anything starts: cut, memory, bytes, time."),
    ("ls", "jobs", "ls", "List jobs, newest first."),
    ("status", "jobs", "status", "Show the cluster and a job: progress, decisions, what it waits for and since when."),
    ("logs", "history", "logs", "Show the log lines of a job's nodes."),
    ("events", "history", "events", "Show a job's history of events."),
    ("metrics", "metrics", "metrics", "Show each step's losses, tokens, learning rate, gradient norm, time and bytes."),
    ("plot", "plot", "plot", "Draw the losses of jobs as a picture: training, validation, learning rate, marks."),
    ("trace", "trace", "trace", "Write a job's timeline for Perfetto: which communication overlapped compute."),
    ("top", "top", "top", "Watch nodes and job live."),
    ("pause", "jobs", "pause", "Pause a job at its next step boundary, with a checkpoint."),
    ("resume", "jobs", "resume", "Go on with a paused job, or start a stopped or failed one again."),
    ("replay", "jobs", "replay", "Compute a job's rounds again with the slots that counted: the same bits."),
    ("replan", "jobs", "replan", "Bring idle servers into a running job, or take servers out of it."),
    ("stop", "jobs", "stop", "End a job at its next step boundary, or at once."),
    ("rm", "rm", "rm", "Remove jobs that have ended: record, history, checkpoints."),
    ("ckpt", "ckpt", "app", "Checkpoints: list and export."),
    ("finetune", "finetune", "app", "Fine-tune a pretrained model: create, watch, generate, compare, export."),
    ("generate", "generate", "generate", "Continue a prompt with a job's model or an exported directory."),
    ("recipes", "recipes", "app", "Recipes: list, show and validate."),
    ("data", "data", "data_app", "Data sets: prepare and inspect."),
    ("serve", "serve", "app", "Run one role of a cluster: coordinator, parameter-server, worker or fine-tuning."),
    ("certs", "certs", "app", "Credentials of a cluster: make, issue, renew and revoke them."),
    ("login", "login", "login", "Store a credential for the addresses that you call."),
    ("logout", "login", "logout", "Remove the credentials stored for addresses."),
    ("health", "health", "health", "Ask a service whether it serves; for health checks of containers."),
    ("doctor", "doctor.command", "doctor", "Check this machine and a cluster: what is wrong, and how to fix it."),
)


OLDER_SPELLINGS = {"out": "to"}
"""Former names of options, which still work. Help and docs only have the new names."""


class LazyGroup(typer.core.TyperGroup):
    """The top-level group: takes help from COMMANDS, and imports a command's module when the command is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of COMMANDS."""
        return [name for name, *_ in COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the command's module and create the command."""
        for name, module, attribute, _ in COMMANDS:
            if name == cmd_name:
                target = getattr(importlib.import_module(f"gradstream.coordinator.cli.{module}"), attribute)
                return _make_command(name, target)
        return None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Resolve a command as typer does; the error for an unknown name suggests the nearest one."""
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            from gradstream.core.errors import nearest

            ctx.fail(f"no such command '{args[0]}'{nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, _, _, text in COMMANDS])


class WholeHelpGroup(typer.core.TyperGroup):
    """A group whose list of commands has the whole first sentence of each, wrapped; click truncates it."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table of commands."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(1000)) for name, command in commands if command])


def _make_command(name: str, target: typer.Typer | Callable[..., Any]) -> Any:
    if not isinstance(target, typer.Typer):
        single = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
        single.command(name)(target)
        target = single
    target.rich_markup_mode = None
    command: Any = typer.main.get_command(target)
    command.name = name
    command.epilog = epilog(name)
    for below, each in getattr(command, "commands", {}).items():
        each.epilog = epilog(f"{name} {below}")
    return command


def group(text: str) -> typer.Typer:
    """Create a group of commands with the settings common to all groups."""
    made = typer.Typer(
        cls=WholeHelpGroup,
        help=text,
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    # With a callback typer makes it a group even if it has only one command.
    made.callback()(lambda: None)
    return made


app = typer.Typer(
    name="gradstream",
    context_settings={"token_normalize_func": lambda token: OLDER_SPELLINGS.get(token, token)},
    cls=LazyGroup,
    help="Train and fine-tune language models on machines joined by an ordinary network.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        from gradstream.core import __version__

        print(f"gradstream {__version__}")
        raise typer.Exit


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (sys.argv[1:] when None); return the exit code."""
    # Errors are reported here, so gRPC must not log them too. gRPC reads this variable when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    words = list(args) if args is not None else sys.argv[1:]
    if words[:1] == ["serve"]:
        return _run(words)  # a role writes a log and goes on if nobody reads it
    try:
        with watched_output():
            code = _run(words)
            sys.stdout.flush()
            return code
    except ReaderLeftError:
        return EXIT_CODE


def _run(words: list[str]) -> int:
    # Not by class: typer's version decides whether it uses its own copy of click or the installed one.
    try:
        result = typer.main.get_command(app).main(args=words, prog_name="gradstream", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if type(error).__name__ == "Abort":
            return 130
        show, code = getattr(error, "show", None), getattr(error, "exit_code", 1)
        if callable(show):
            show()
            _show_override(error, words)
            return int(code)
        return _report(error)


def _show_override(error: Exception, words: list[str]) -> None:
    """Explain how to override a recipe's key, for an option with such a name here or in another tool."""
    option, command = getattr(error, "option_name", None), getattr(getattr(error, "ctx", None), "command", None)
    if not option or not any("--set" in parameter.opts for parameter in getattr(command, "params", ())):
        return
    from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe
    from gradstream.core.recipe.problems import key_meant
    from gradstream.core.recipe.recipe import Recipe

    key = key_meant(option.lstrip("-").replace("-", "_"), FineTuningRecipe if words[0] == "finetune" else Recipe)
    if key is not None:
        from gradstream.coordinator.cli.views.terminal import say

        say(f"Keys of a recipe are overridden with -s: -s {key}=VALUE")


def _report(error: Exception) -> int:
    from gradstream.core.errors import GradstreamError, one_line
    from gradstream.core.shown import shown

    if isinstance(error, ModuleNotFoundError):
        from gradstream.core.extras import explained

        error = explained("this command", error) or error
    if os.environ.get("GRADSTREAM_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    red, normal = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    if isinstance(error, GradstreamError):
        print(f"{red}error: {shown(one_line(error))}{normal}", file=sys.stderr)
        return error.exit_code
    print(f"{red}error: {shown(one_line(error))}{normal}", file=sys.stderr)
    if os.environ.get("GRADSTREAM_DEBUG") != "1":
        print("run with GRADSTREAM_DEBUG=1 for the stack trace", file=sys.stderr)
    return 1
