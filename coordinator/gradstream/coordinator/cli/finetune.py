"""`gradstream finetune`: fine-tune a pretrained model and use the result."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstream.coordinator.cli.app import group
from gradstream.coordinator.cli.finetune_dev import dev
from gradstream.coordinator.cli.options import (
    EndedFineTuningArgument,
    NewestFineTuningArgument,
    OutputFormat,
    OutputOption,
    OverrideOption,
    RecipeArgument,
    RequestIdOption,
    ServiceOption,
    find_recipe,
    name_it,
    open_fine_tuning_client,
)
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.client import FineTuning, FineTuningClient, GeneratedText

app = group(
    "Fine-tune a pretrained model. dev does it all on this machine; the others ask a service that `gradstream serve "
    "fine-tuning` runs."
)

app.command()(dev)

SHOWN_SAMPLES = 3

MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        min=1,
        max=2**32 - 1,
        help="Maximum tokens to add.",
        show_default="128, or as many as fit",
    ),
]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")]
TopPOption = Annotated[float, typer.Option("--top-p", min=0, max=1, help="Sample from the likeliest share p.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**64 - 1, help="Same seed, same text.")]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text before which to end; may be repeated.")
]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="The prompt is a user's message, rendered by the base's chat template.")
]

SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="With --chat: the system's message before the prompt.")
]


# ---- Create ----------------------------------------------------------------------------------------------------------


@app.command()
def create(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show examples as they would be trained on, and begin nothing.")
    ] = False,
    num_examples: Annotated[int, typer.Option("-n", min=1, max=100, help="With --dry-run: how many examples.")] = 3,
    upload: Annotated[
        bool, typer.Option("--upload", help="Send the files of examples; the service need not see them.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show its progress until it ends.")] = False,
    request_id: RequestIdOption = None,
    service: ServiceOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Begin a fine-tuning. Prints its name once its job is submitted."""
    from gradstream.core.recipe.fine_tuning_recipe import load_fine_tuning_recipe

    asked = load_fine_tuning_recipe(find_recipe(recipe), overrides or ())
    with open_fine_tuning_client(service) as client:
        for path in (asked.data.path, asked.data.validation_path) if upload else ():
            if path is not None:
                terminal.say(f"sending {Path(path).name}")
        if dry_run:
            preview = client.preview(asked, (), num_examples, upload=upload)
            if output is OutputFormat.json:
                terminal.print_json(preview.to_dict())
                return
            from gradstream.coordinator.cli.views.fine_tunings import print_preview

            print_preview(preview, asked)
            again = [recipe, *(word for each in overrides or () for word in ("-s", each)), *(["--upload"] * upload)]
            terminal.hint(f"begin: gradstream finetune create {shlex.join(again)}")
            return
        made = client.create(asked, upload=upload, request_id=request_id)
        made = _follow(client, made, output, lambda now: not wait and now.state != "preparing")
    _print_one(made, output)
    from gradstream.coordinator.cli.views.fine_tunings import chat_flag

    if made.state == "finished":
        terminal.hint(
            f"look: gradstream finetune compare {made.name}",
            f"use it: gradstream finetune generate {made.name} --prompt TEXT{chat_flag(made)}",
            f"take it: gradstream finetune export {made.name} --to DIR",
        )
    else:
        terminal.hint(f"watch it: gradstream finetune watch {made.name}, gradstream finetune status {made.name}")


def _follow(
    client: FineTuningClient, made: FineTuning, output: OutputFormat, enough: Callable[[FineTuning], bool]
) -> FineTuning:
    """Show progress until the fine-tuning has ended or `enough` returns True. Raises FineTuningFailedError."""
    from gradstream.client import FineTuningFailedError
    from gradstream.coordinator.cli.views.fine_tunings import FollowReporter
    from gradstream.coordinator.cli.views.progress import ProgressView

    try:
        with ProgressView() as view:
            return client.wait(made.name, FollowReporter(view), until=enough, poll_seconds=0.5)
    except FineTuningFailedError as error:
        if output is OutputFormat.json:
            terminal.print_json(error.fine_tuning.to_dict())
        raise
    except KeyboardInterrupt:
        terminal.say(f"\ndetached; {made.name} goes on. Cancel it with: gradstream finetune cancel {made.name}")
        return client.get(made.name)


# ---- List and watch --------------------------------------------------------------------------------------------------


@app.command()
def ls(service: ServiceOption = None, output: OutputOption = OutputFormat.table) -> None:
    """List fine-tunings, newest first, and what the service generates."""
    from gradstream.core.errors import ProtocolError

    with open_fine_tuning_client(service) as client:
        fine_tunings = client.list()
        generation = None
        if output is OutputFormat.table:
            with suppress(ProtocolError):  # a service of an earlier version does not have this call
                generation = client.generation()
    if output is OutputFormat.json:
        terminal.print_json([each.to_dict() for each in fine_tunings])
        return
    if generation is not None and generation.num_running + generation.num_waiting > 0:
        from gradstream.coordinator.cli.views.fine_tunings import generation_line

        terminal.say(generation_line(generation))
    if not fine_tunings:
        terminal.say("no fine-tunings yet")
        terminal.hint("create one: gradstream finetune create RECIPE")
        return
    from gradstream.coordinator.cli.views.fine_tunings import fine_tunings_table, state_of

    terminal.show(fine_tunings_table(fine_tunings))
    for each in fine_tunings:
        if state_of(each) == "paused":
            terminal.hint(f"go on with {each.name}: gradstream finetune resume {each.name}")
    terminal.hint(f"more about one: gradstream finetune status {fine_tunings[0].name}")


@app.command()
def status(
    name: NewestFineTuningArgument = None,
    service: ServiceOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a fine-tuning: its job, its examples, and the losses of base and result."""
    with open_fine_tuning_client(service) as client:
        found = client.get(name)
    if output is OutputFormat.json:
        terminal.print_json(found.to_dict())
        return
    from gradstream.coordinator.cli.views.fine_tunings import fine_tuning_view

    terminal.show(fine_tuning_view(found))


@app.command()
def watch(
    name: NewestFineTuningArgument = None,
    service: ServiceOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a fine-tuning's history until it ends: states, validation losses, checkpoints, events.

    With -o json, one object a line, steps too.
    """
    from gradstream.client import FineTuning, FineTuningFailedError

    last: FineTuning | None = None
    with open_fine_tuning_client(service) as client:
        try:
            name = client.get(name).name
            for item in client.watch(name):
                if isinstance(item, FineTuning):
                    # An item with only a new best version would show the same line again.
                    same = last is not None and (last.state, last.reason) == (item.state, item.reason)
                    last = item
                    if same and output is not OutputFormat.json:
                        continue
                _show(item, output)
        except KeyboardInterrupt:
            terminal.say(f"\ndetached; {name} goes on. Look again with: gradstream finetune watch {name}")
            return
    if last is not None and last.state == "failed":
        raise FineTuningFailedError(last)


def _show(item: Any, output: OutputFormat) -> None:
    from rich.text import Text

    from gradstream.client import Checkpoint, Event, FineTuning, Validation
    from gradstream.core.job_states import after_state

    if output is OutputFormat.json:
        terminal.print_json_line(
            {"type": "fine-tuning", **item.to_dict()} if isinstance(item, FineTuning) else item.to_dict()
        )
        return
    if isinstance(item, FineTuning):
        line = Text.assemble(f"{item.name} ", terminal.state_text(item.state), after_state(item.state, item.reason))
    elif isinstance(item, Validation):
        line = Text(f"validation loss {terminal.format_loss(item.loss)} at version {item.version}")
    elif isinstance(item, Checkpoint):
        line = Text(f"checkpoint of version {item.version}, {terminal.format_bytes(item.num_bytes)}", style="dim")
    elif isinstance(item, Event) and item.kind not in ("step", "validation", "checkpoint"):
        line = Text.assemble((f"{terminal.format_time(item.time)} {item.kind}: ", "cyan"), item.message)
    else:
        return
    terminal.console().print(line, soft_wrap=True)


# ---- Pause, resume, cancel -------------------------------------------------------------------------------------------


@app.command()
def pause(
    name: NewestFineTuningArgument = None, service: ServiceOption = None, output: OutputOption = OutputFormat.table
) -> None:
    """Pause a fine-tuning's job at its next step boundary."""
    with open_fine_tuning_client(service) as client:
        made = client.pause(name or client.get().name)
    _print_one(made, output)
    terminal.hint(f"go on with: gradstream finetune resume {made.name}")


@app.command()
def resume(
    name: NewestFineTuningArgument = None, service: ServiceOption = None, output: OutputOption = OutputFormat.table
) -> None:
    """Go on with a paused, failed or cancelled fine-tuning."""
    with open_fine_tuning_client(service) as client:
        made = client.resume(name or client.get().name)
    _print_one(made, output)
    terminal.hint(f"watch it: gradstream finetune watch {made.name}")


@app.command()
def cancel(
    name: EndedFineTuningArgument = None, service: ServiceOption = None, output: OutputOption = OutputFormat.table
) -> None:
    """End a fine-tuning at once; its checkpoints stay."""
    with open_fine_tuning_client(service) as client:
        if name is None:
            raise name_it("gradstream finetune cancel", "ends a fine-tuning", client.get().name)
        made = client.cancel(name)
    _print_one(made, output)
    terminal.hint(f"start it again: gradstream finetune resume {name}")


def _print_one(each: FineTuning, output: OutputFormat) -> None:
    if output is OutputFormat.json:
        terminal.print_json(each.to_dict())
        return
    job = each.job
    state = f"{each.name} {each.state}" + (f", job {job.job_id} {job.state}" if job is not None else "")
    reasons = [each.reason, job.reason if job is not None and not job.state.ended else ""]
    terminal.print_line(": ".join([state, *filter(None, ["; ".join(filter(None, reasons))])]))


# ---- Generate, compare, export ---------------------------------------------------------------------------------------


@app.command()
def generate(
    name: NewestFineTuningArgument = None,
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue.")],
    base: Annotated[bool, typer.Option("--base", help="Generate with the base alone, without the adapter.")] = False,
    chat: ChatOption = False,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    service: ServiceOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Continue a prompt with a fine-tuning's best version. The text appears as it is generated."""
    settings = _settings(max_new_tokens, temperature, top_p, seed, stop)
    pieces: list[GeneratedText] = []
    with open_fine_tuning_client(service) as client:
        name = name or client.get().name
        working = terminal.WorkingLine()
        working("waiting for the first token: the service may have to load the model …")
        try:
            for piece in client.generate(name, _prompt(prompt, chat, system), base=base, **settings):
                if not pieces:
                    working("")
                pieces.append(piece)
                if output is OutputFormat.table:
                    terminal.print_text(piece.text, end="")
        except KeyboardInterrupt:
            if pieces and output is OutputFormat.table:
                print()
            raise
        finally:
            if not pieces:
                working("")
    last = pieces[-1] if pieces else None
    if output is OutputFormat.json:
        terminal.print_json(
            {
                "name": name,
                "base": base,
                "prompt": prompt,
                "text": "".join(piece.text for piece in pieces),
                "num_tokens": last.num_tokens if last else 0,
                "finish_reason": last.finish_reason if last else "",
                **settings,
            }
        )
    else:
        print()
    if last is not None and last.finish_reason == "length":
        terminal.hint(f"it ended at {last.num_tokens} tokens; more with --max-new-tokens")


@app.command()
def compare(
    name: NewestFineTuningArgument = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="Text to continue; may be repeated. Left out: held-out prompts."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option("-n", min=1, help="How many held-out prompts.")] = SHOWN_SAMPLES,
    chat: ChatOption = False,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    service: ServiceOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show the texts of the base and of the fine-tuning's best version side by side."""
    from gradstream.coordinator.cli.views.fine_tunings import Comparison, held_out, print_comparisons
    from gradstream.core.errors import ConfigError

    settings = _settings(max_new_tokens, temperature, top_p, seed, stop)
    with open_fine_tuning_client(service) as client:
        found = client.get(name)
        if prompts:

            def said(prompt: str, base: bool) -> str:
                pieces = client.generate(found.name, _prompt(prompt, chat, system), base=base, **settings)
                return "".join(piece.text for piece in pieces)

            comparisons = [
                Comparison(prompt, None, base=said(prompt, True), result=said(prompt, False)) for prompt in prompts
            ]
        else:
            comparisons = held_out(found)[:num_samples]
            if not comparisons:
                raise ConfigError(f"{found.name} has no held-out prompts; compare with --prompt")
    if output is OutputFormat.json:
        terminal.print_json(
            {
                "name": found.name,
                "before": found.before.to_dict() if found.before else None,
                "after": found.after.to_dict() if found.after else None,
                "comparisons": [comparison.to_dict() for comparison in comparisons],
            }
        )
        return
    print_comparisons(found, comparisons)


@app.command()
def export(
    name: NewestFineTuningArgument = None,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="New or empty directory.")],
    merged: Annotated[bool, typer.Option("--merged", help="A whole model, the adapter merged into the base.")] = False,
    version: Annotated[int | None, typer.Option("--version", min=0, help="Which one; the best by default.")] = None,
    service: ServiceOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Write a result as a directory: peft's adapter, or a Hugging Face model."""
    from gradstream.coordinator.cli.ckpt import ExportReporter

    with open_fine_tuning_client(service) as client:
        path = client.export(
            name or client.get().name,
            to,
            kind="merged" if merged else None,
            version=version,
            on_progress=ExportReporter(),
        )
    if output is OutputFormat.json:
        files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        terminal.print_json({"directory": str(path), "files": files})
    else:
        terminal.print_line(str(path))


def _prompt(prompt: str, chat: bool, system: str | None) -> Any:
    from gradstream.core.errors import ConfigError

    if system is not None and not chat:
        raise ConfigError("--system is a message of a conversation; give --chat too")
    told = [{"role": "system", "content": system}] if system is not None else []
    return [*told, {"role": "user", "content": prompt}] if chat else prompt


def _settings(
    max_new_tokens: int | None, temperature: float, top_p: float, seed: int, stop: list[str] | None
) -> dict[str, Any]:
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or [],
    }
