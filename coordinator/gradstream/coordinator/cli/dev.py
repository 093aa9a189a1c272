"""`gradstream dev`: run a recipe from start to end on this machine.

The phases are: prepare the data, start the cluster, run the job, export, stop the cluster, show the result.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstream.coordinator.cli.local.earlier_run import KEPT, cluster_directory, find_earlier_run
from gradstream.coordinator.cli.options import OutputFormat, OutputOption, OverrideOption, find_recipe
from gradstream.coordinator.cli.views import terminal
from gradstream.coordinator.cli.views.step_times import step_line, step_word
from gradstream.coordinator.cli.views.steps import rounds_of

if TYPE_CHECKING:
    from gradstream.client import AsyncClient, Job
    from gradstream.coordinator.cli.local.cluster import LocalCluster
    from gradstream.coordinator.cli.local.earlier_run import EarlierRun
    from gradstream.coordinator.cli.views.progress import ProgressView
    from gradstream.core.recipe.recipe import Recipe

SAMPLE_TOKENS = 120
MEMORY_SHARE = 0.8
DEFAULT_NODES = 2
QUIET_EVENTS = ("step", "validation", "log")


def dev(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A recipe file, or the name of one of `gradstream recipes ls`.", show_default=False
        ),
    ] = None,
    overrides: OverrideOption = None,
    servers: Annotated[
        int | None,
        typer.Option("--servers", min=1, help="Parameter servers to start.", show_default="2, or what the recipe asks"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Workers to start.", show_default="2, or what the recipe asks"),
    ] = None,
    run_root: Annotated[
        Path | None, typer.Option("--run-root", metavar="DIR", help="Where the job's directory is made.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="JOB",
            help="Instead of a RECIPE: go on with a job that an earlier `gradstream dev` has run, by its id or its "
            "directory.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            min=1,
            help="With --resume: go on to N steps in all, as `gradstream resume --steps` does.",
            show_default="those that it has",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the cluster up after the job, until Ctrl-C.")] = False,
    fine_tuning: Annotated[
        bool, typer.Option("--fine-tuning", help="With --keep: start a fine-tuning service too.")
    ] = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The prompt of the sample at the end.", show_default=False)
    ] = None,
    output: OutputOption = OutputFormat.table,
) -> int:
    """Train a recipe here: start a cluster on this machine, run the job, show the result.

    Ctrl-C stops the job at its next step with a checkpoint; a second one stops it at once. --resume goes on with it.
    """
    from gradstream.core.errors import ConfigError
    from gradstream.core.extras import require
    from gradstream.core.job_states import FINISHED
    from gradstream.core.recipe.loading import load_recipe

    require("`gradstream dev`", "node", "plot")
    earlier = None
    if (recipe is None) == (resume is None):
        raise ConfigError("name a RECIPE to start a job, or --resume JOB to go on with one")
    if recipe is not None:
        if steps is not None:
            raise ConfigError(f"--steps goes with --resume; for a new job say -s training.num_steps={steps}")
        loaded = load_recipe(find_recipe(recipe), overrides or ())
        if run_root is not None:
            loaded = loaded.model_copy(update={"run_root": str(run_root.expanduser().absolute())})
    else:
        assert resume is not None
        if overrides:
            raise ConfigError("a job goes on with the recipe that it has; leave --set out, or start a job of a RECIPE")
        earlier = find_earlier_run(resume, (run_root or Path("runs")).expanduser().absolute())
        loaded = earlier.recipe
        if earlier.record.state == FINISHED and steps is None:
            raise ConfigError(
                f"job {earlier.record.job_id} has done all of its {loaded.training.num_steps} steps; give it more with "
                f"--steps N"
            )
    cluster, replica = loaded.cluster, loaded.pipeline.min_workers
    servers = servers if servers is not None else max(DEFAULT_NODES, cluster.min_servers)
    workers = workers if workers is not None else max(DEFAULT_NODES, cluster.min_workers, replica)
    if workers < replica:
        raise ConfigError(
            f"--workers {workers} is fewer than the {replica} that pipeline.stages={loaded.pipeline.stages} needs; "
            f"start more or set -s pipeline.stages=auto"
        )
    for what, have, need in (
        ("servers", servers, cluster.min_servers),
        ("workers", workers, cluster.min_workers),
    ):
        if have < need:
            raise ConfigError(
                f"--{what} {have} is fewer than the recipe's cluster.min_{what} {need}; "
                f"start more or set -s cluster.min_{what}={have}"
            )
    if fine_tuning and not keep:
        raise ConfigError("--fine-tuning needs a cluster that stays up; add --keep")
    prepare_data(loaded)
    run = _Run(loaded, servers, workers, keep, fine_tuning)
    if earlier is not None:
        run.earlier, run.num_steps = earlier, steps
    code = asyncio.run(run.run())
    if run.job is None or run.exported is None:
        return code
    _show(run, prompt, output)
    return code


def prepare_data(recipe: Recipe) -> None:
    """Prepare the recipe's data if it is missing. Raises ConfigError if the recipe then has no data.prepare."""
    from gradstream.core.data.manifest import MANIFEST_NAME
    from gradstream.core.errors import ConfigError
    from gradstream.core.storage import files

    path = recipe.data.path
    if MANIFEST_NAME in files.list_names(path):
        return
    if recipe.data.prepare is None:
        raise ConfigError(
            f"data.path {path} holds no {MANIFEST_NAME}, and the recipe has no data.prepare; "
            f"prepare the data with `gradstream data prepare` or correct data.path"
        )
    from gradstream.coordinator.data.prepare import PrepareProgress, prepare

    terminal.say(f"preparing data in {path}")
    notes: list[str] = []

    def remember(progress: PrepareProgress) -> None:
        notes[:] = progress.notes

    if not sys.stderr.isatty():
        manifest = prepare(recipe.data.prepare, path, remember)
    else:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=terminal.console(stderr=True),
            transient=True,
        ) as bar:
            task = bar.add_task("data", total=None, facts="")

            def show(progress: PrepareProgress) -> None:
                remember(progress)
                facts = f"{progress.num_documents} documents, {terminal.format_count(progress.num_tokens)} tokens"
                bar.update(
                    task,
                    description=progress.phase,
                    completed=progress.bytes_done,
                    total=progress.bytes_total or None,
                    facts=facts if progress.num_tokens else "",
                )

            manifest = prepare(recipe.data.prepare, path, show)
    num_tokens = sum(shard.num_tokens for shard in manifest.shards)
    for note in notes:
        terminal.warn(note)
    for what, count in manifest.left_out.items():
        terminal.say(f"left out: {what} ({count})")
    terminal.say(f"data is ready: {terminal.format_count(num_tokens)} tokens in {len(manifest.shards)} data shards")


@dataclass
class _Run:
    """One run of `dev`: the cluster, the job and its last known state."""

    recipe: Recipe
    num_servers: int
    num_workers: int
    keep: bool
    fine_tuning: bool = False
    earlier: EarlierRun | None = None
    # In all, where the job of `earlier` is to have another number than it has.
    num_steps: int | None = None
    job: Job | None = None
    exported: Path | None = None
    interrupts: int = 0

    async def run(self) -> int:
        """Run the job to its end; return the exit code. Raises JobFailedError, and any error that prevents the run."""
        from gradstream.coordinator.cli.local.cluster import LocalCluster

        earlier = self.earlier
        run_root = earlier.run_directory.parent if earlier is not None else Path(self.recipe.run_root)
        directory = cluster_directory(run_root, os.getpid())
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        if earlier is not None:
            earlier.move_state(directory)
        self._interrupted = asyncio.Event()
        self._main = asyncio.current_task()
        self._client: AsyncClient | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._terminated = False
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_terminate)
        terminal.say(f"starting a coordinator, {self.num_servers} parameter servers and {self.num_workers} workers")
        try:
            cluster = LocalCluster(
                directory,
                self.num_servers,
                self.num_workers,
                self._memory_bytes(),
                on_news=terminal.warn,
                fine_tuning=self.fine_tuning,
                logs=earlier.run_directory / "logs" if earlier is not None else None,
            )
            async with cluster:
                code = await self._run_job(cluster)
        except asyncio.CancelledError:
            # Cancelled by one of the signal handlers above; no other code has this task.
            return 143 if self._terminated else 130
        finally:
            self._clean_up(directory)
        return code

    def _memory_bytes(self) -> int:
        import psutil

        return int(
            psutil.virtual_memory().total * MEMORY_SHARE / (self.num_servers + self.num_workers + self.fine_tuning)
        )

    async def _run_job(self, cluster: LocalCluster) -> int:
        from gradstream.client import AsyncClient, JobFailedError
        from gradstream.coordinator.cli.local.metrics_files import save_metrics
        from gradstream.coordinator.cli.views.progress import ProgressView

        async with AsyncClient(cluster.address, credentials=cluster.credentials) as client:
            self._client = client
            # 1. Submit, or go on with the earlier job.
            cursor = 0
            if self.earlier is not None:
                job = self.job = await client.job(self.earlier.record.job_id)
                async for item in client.watch(job.job_id, follow=False, kinds=["event"]):
                    cursor = item.cursor
                job = self.job = await client.resume(job.job_id, self.num_steps)
                terminal.say(f"{job.job_id} goes on from {rounds_of(job).version_text(job.version)}: {job.reason}")
            else:
                job = self.job = await client.submit(self.recipe)
                cluster.move_logs(Path(job.run_directory) / "logs")
                terminal.say(f"submitted {job.job_id}; files in {job.run_directory}")
            terminal.say(f"look at it from another terminal: gradstream top -c {cluster.address}")
            terminal.say("processes: " + ", ".join(f"{name} {pid}" for name, pid in cluster.pids.items()))
            # 2. Follow it to its end.
            with ProgressView() as view:
                cluster.on_news = view.say
                teller = asyncio.create_task(self._tell(client, job.job_id, cursor, view))
                waiter = asyncio.create_task(client.wait(job.job_id, view.update, poll_seconds=0.5))
                try:
                    futures: set[asyncio.Future[Any]] = {waiter, cluster.failed}
                    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
                    if not waiter.done():
                        cluster.failed.result()
                    job = self.job = waiter.result()
                    # The history ends with the job.
                    await asyncio.wait({teller}, timeout=10)
                except JobFailedError as error:
                    self.job = error.job
                    await asyncio.wait({teller}, timeout=5)
                    raise
                finally:
                    cluster.on_news = terminal.warn
                    for task in (waiter, teller):
                        task.cancel()
                    await asyncio.gather(waiter, teller, return_exceptions=True)
            # 3. Save the metrics, and export the last checkpoint if there is one.
            await save_metrics(client, job)
            checkpoints = await client.checkpoints(job.job_id)
            if not checkpoints:
                terminal.say(f"{job.job_id} {job.state} at step {job.step} without a checkpoint")
                return 130 if self.interrupts else 1
            if job.state == "finished":
                self.exported = await client.export(job.job_id, self._new_export(job))
            else:
                last = checkpoints[-1]
                terminal.say(f"{job.job_id} {job.state} at step {job.step}; its last checkpoint is {last.path}")
            # 4. Keep the cluster up, with --keep.
            if self.keep:
                terminal.say(f"the cluster stays up at {cluster.address} until Ctrl-C")
                if self.fine_tuning:
                    terminal.say(
                        f"fine-tune with it: gradstream finetune create --service {cluster.fine_tuning_address}"
                    )
                self._client = None
                self._interrupted.clear()
                await self._interrupted.wait()
            self._client = None
            return 0 if job.state == "finished" else 130

    @staticmethod
    def _new_export(job: Job) -> Path:
        """Where the result goes: an earlier export, of fewer steps, stays as it is."""
        plain = Path(job.run_directory) / "export"
        return plain.with_name(f"export-{job.step}") if plain.exists() else plain

    async def _tell(self, client: AsyncClient, job_id: str, after_cursor: int, view: ProgressView) -> None:
        """Show events as they happen."""
        from gradstream.client import Event

        async for item in client.watch(job_id, after_cursor=after_cursor, kinds=["event"]):
            if isinstance(item, Event) and item.kind not in QUIET_EVENTS:
                view.say(f"{terminal.format_time(item.time)} {item.kind}: {item.message}")

    def _on_interrupt(self) -> None:
        self.interrupts += 1
        self._interrupted.set()
        job, client = self.job, self._client
        if client is None or job is None or self.interrupts > 2:
            if not (self.keep and self.exported is not None and self.interrupts == 1) and self._main is not None:
                self._main.cancel()
            return
        now = self.interrupts == 2
        terminal.say(
            f"\nstopping {job.job_id} at once"
            if now
            else f"\nstopping {job.job_id} at its next step, with a checkpoint; Ctrl-C again stops it at once"
        )
        task = asyncio.create_task(self._stop(client, job.job_id, now))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop(self, client: AsyncClient, job_id: str, now: bool) -> None:
        from gradstream.core.errors import GradstreamError, one_line

        try:
            await client.stop(job_id, now)
        except GradstreamError as error:
            terminal.warn(f"{one_line(error)}; Ctrl-C {'again ' if now else 'three times '}ends everything")

    def _on_terminate(self) -> None:
        self._terminated = True
        if self._main is not None:
            self._main.cancel()

    def _clean_up(self, directory: Path) -> None:
        """Move the coordinator's state to the job's files; remove the rest."""
        job = self.job
        run_directory = Path(job.run_directory) if job is not None else None
        if self.earlier is not None:
            run_directory = self.earlier.run_directory
        if run_directory is not None:
            for name in KEPT:
                if (directory / name).is_dir() and not (run_directory / name).exists():
                    os.replace(directory / name, run_directory / name)
            shutil.rmtree(directory, ignore_errors=True)
            if self.exported is None:
                root = run_directory.parent
                place = "" if root == Path("runs").absolute() else f" --run-root {shlex.quote(str(root))}"
                terminal.say(f"go on with: gradstream dev --resume {run_directory.name}{place}")
        elif self.interrupts or self._terminated:
            shutil.rmtree(directory, ignore_errors=True)


def _show(run: _Run, prompt: str | None, output: OutputFormat) -> None:
    """Sample from the exported model; print the sample and the job's figures."""
    from gradstream.coordinator.cli.generate import generate_text
    from gradstream.coordinator.cli.local.metrics_files import METRICS_FILE, PICTURE_FILE

    job, exported = run.job, run.exported
    assert job is not None
    assert exported is not None
    picture, metrics = Path(job.run_directory) / PICTURE_FILE, Path(job.run_directory) / METRICS_FILE
    if prompt is None:
        prepare = run.recipe.data.prepare
        prompt = "def " if prepare is not None and "stdlib:" in prepare.sources else ""
    sample = generate_text(exported, prompt, max_new_tokens=SAMPLE_TOKENS)
    if output is OutputFormat.json:
        terminal.print_json(
            {
                "job": job.to_dict(),
                "initial_validation_loss": job.initial_validation_loss,
                "validation_loss": job.validation_loss,
                "export": str(exported),
                "loss_plot": str(picture),
                "metrics": str(metrics),
                "prompt": prompt,
                "sample": sample,
            }
        )
        return
    print()
    print("a sample from the exported model:")
    for line in (prompt + sample).splitlines():
        terminal.print_text(f"    {line}")
    print()
    if job.initial_validation_loss is not None and job.validation_loss is not None:
        terminal.print_line(
            f"validation loss: {job.initial_validation_loss:.4f} before, {job.validation_loss:.4f} after "
            f"{job.step} steps (nats a token)"
        )
    if job.step_breakdown is not None:
        terminal.print_line(f"{f'a {step_word(job.step_breakdown)} took:':<17}{step_line(job.step_breakdown)}")
    terminal.print_line(f"loss curve:      {picture}")
    terminal.print_line(f"metrics:         {metrics}")
    terminal.print_line(f"model:           {exported}")
    terminal.print_line(f"checkpoints:     {Path(job.run_directory) / 'checkpoints'}")
    terminal.print_line(f"logs:            {Path(job.run_directory) / 'logs'}")
    terminal.hint(
        f'try next: gradstream generate {exported} --prompt "{prompt or "Once"}"',
        f"          gradstream serve coordinator --state {Path(job.run_directory) / 'state'}   (its history)",
    )
