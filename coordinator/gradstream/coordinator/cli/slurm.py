"""`gradstream submit --slurm`: render deploy/slurm/gradstream.sbatch for a recipe and hand it to sbatch.

The rendered script, the recipe and everything that the cluster writes lie in one directory, `run_root/slurm/NAME-N`.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradstream.core.recipe.recipe import Recipe

SCRIPT = "gradstream.sbatch"
DRAIN_SECONDS = 120
DEFAULT_NODES = 2
MARGIN_SECONDS = 20
"""Slurm needs some seconds before the time limit to take the job back into its queue."""
SBATCH_SECONDS = 60.0
# An option of sbatch without its dashes, and its value if there is one.
_DIRECTIVE = re.compile(r"([a-z][a-z-]*[a-z])(?:=(\S(?:.*\S)?))?")
_OURS = ("nodes", "time", "partition", "signal", "output", "job-name")


@dataclass(frozen=True)
class SlurmOptions:
    """What a person asks of Slurm. None leaves the value to the script, or to the partition."""

    nodes: int | None = None
    time: str | None = None
    partition: str | None = None
    servers: int | None = None
    workers_per_node: int | None = None
    drain_seconds: int = DRAIN_SECONDS
    sbatch: Sequence[str] = ()


@dataclass(frozen=True)
class SlurmJob:
    """A job that Slurm has taken: its id there, and the directory of its cluster."""

    slurm_job_id: str
    directory: Path
    drain_seconds: int
    time: str | None

    @property
    def script(self) -> Path:
        """The rendered script."""
        return self.directory / SCRIPT

    def to_dict(self) -> dict[str, object]:
        """The job as a JSON document."""
        return {
            "slurm_job_id": self.slurm_job_id,
            "directory": str(self.directory),
            "script": str(self.script),
            "log": str(self.log),
            "drain_seconds": self.drain_seconds,
        }

    @property
    def log(self) -> Path:
        """What the script prints, also over requeues."""
        return self.directory / f"slurm-{self.slurm_job_id}.out"

    def advice(self) -> list[str]:
        """Lines that say how to follow the job, what happens at the time limit, and how to add workers."""
        directory = shlex.quote(str(self.directory))
        limit = f"the time limit of {self.time}" if self.time is not None else "the partition's time limit"
        credentials = f"GRADSTREAM_CREDENTIALS={directory}/credentials/admin"
        return [
            f"its files: {self.directory}, which all nodes must see",
            f"its log:   tail -F {shlex.quote(str(self.log))}",
            f'follow it: {credentials} gradstream status -c "$(cat {directory}/address)"  (once it runs)',
            f"time:      {self.drain_seconds} s before {limit} training stops with a checkpoint, and Slurm queues the "
            f"job again; it goes on from there",
            f"more workers while it runs: GRADSTREAM_JOIN={directory} sbatch --nodes=1 {directory}/{SCRIPT}",
        ]


def script_path() -> Path:
    """The script in the installed package, or in the checkout."""
    here = Path(__file__).resolve()
    places = (here.parents[1] / "slurm" / SCRIPT, here.parents[4] / "deploy" / "slurm" / SCRIPT)
    return next(path for path in places if path.is_file())


def check_options(options: SlurmOptions, recipe: Recipe) -> None:
    """Raise ConfigError when sbatch could not take these options, or the recipe would wait for more than there is."""
    from gradstream.core.errors import ConfigError

    if options.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED", options.time):
        raise ConfigError(
            f"--time '{options.time}' is no time of Slurm's; write minutes, or like 4:00:00 or 2-12:00:00"
        )
    if options.drain_seconds < 2 * MARGIN_SECONDS:
        raise ConfigError(f"--drain {options.drain_seconds} is too short; give at least {2 * MARGIN_SECONDS} s")
    parse_sbatch(options.sbatch)
    if options.servers is not None and options.servers < recipe.cluster.min_servers:
        raise ConfigError(
            f"--servers {options.servers} is fewer than the recipe's cluster.min_servers {recipe.cluster.min_servers}"
        )
    each, needed = workers_per_node(options), _workers_needed(recipe)
    if options.nodes is not None and each is not None and options.nodes * each < needed:
        raise ConfigError(
            f"--nodes {options.nodes} gives {options.nodes * each} workers, and the recipe needs {needed}; ask for "
            f"more nodes, set --workers-per-node, or lower cluster.min_workers"
        )


def workers_per_node(options: SlurmOptions) -> int | None:
    """The workers that the script starts on each node; None when only Slurm knows how many GPUs a node gets."""
    if options.workers_per_node is not None:
        return options.workers_per_node
    return None if any(key.startswith(("gpu", "gres")) for key in parse_sbatch(options.sbatch)) else 1


def num_nodes(options: SlurmOptions, recipe: Recipe) -> int:
    """The nodes to ask for: those of the options, else 2, or as many as the recipe's workers need."""
    return options.nodes or max(DEFAULT_NODES, math.ceil(_workers_needed(recipe) / (workers_per_node(options) or 1)))


def _workers_needed(recipe: Recipe) -> int:
    return max(recipe.cluster.min_workers, recipe.pipeline.min_workers)


def parse_sbatch(given: Sequence[str]) -> dict[str, str | None]:
    """Parse --sbatch options, KEY=VALUE or KEY, as directives: None for an option without a value.

    Raises ConfigError for another form, and for an option that `gradstream submit` has itself.
    """
    from gradstream.core.errors import ConfigError

    found: dict[str, str | None] = {}
    for item in given:
        match = _DIRECTIVE.fullmatch(item.removeprefix("--"))
        if match is None or "\n" in item:
            raise ConfigError(
                f"--sbatch '{item}' is not of the form KEY=VALUE, like account=physics or gpus-per-node=4"
            )
        if match[1] in _OURS:
            own = {"signal": "--drain", "output": "no such option", "job-name": "the recipe's name"}
            raise ConfigError(
                f"--sbatch {match[1]} is set by {own.get(match[1], '--' + match[1])} of gradstream submit"
            )
        found[match[1]] = match[2]
    return found


def directives(options: SlurmOptions, recipe: Recipe, directory: Path) -> dict[str, str | None]:
    """The #SBATCH lines to set, by option; None for one without a value."""
    found: dict[str, str | None] = {
        "job-name": recipe.name,
        "nodes": str(num_nodes(options, recipe)),
        "output": f"{directory}/slurm-%j.out",
        "signal": f"B:TERM@{options.drain_seconds}",
    }
    if options.time is not None:
        found["time"] = options.time
    if options.partition is not None:
        found["partition"] = options.partition
    return found | parse_sbatch(options.sbatch)


def settings(options: SlurmOptions, recipe: Recipe, directory: Path, command: str) -> dict[str, str]:
    """The script's settings, by variable."""
    servers = options.servers if options.servers is not None else recipe.cluster.min_servers
    found = {
        "GRADSTREAM_COMMAND": command,
        "GRADSTREAM_DIR": str(directory),
        "GRADSTREAM_SERVERS": str(servers),
        "GRADSTREAM_DRAIN_SECONDS": str(options.drain_seconds - MARGIN_SECONDS),
    }
    if options.workers_per_node is not None:
        found["GRADSTREAM_WORKERS"] = str(options.workers_per_node)
    return found


def render(
    script: str, directives: Mapping[str, str | None], settings: Mapping[str, str], arguments: Sequence[str]
) -> str:
    """The script with these #SBATCH lines instead of its own of the same options, with settings and arguments.

    The other #SBATCH lines stay. Settings come right after them, so they win over the environment.
    """
    lines = script.splitlines()
    at = [number for number, line in enumerate(lines) if line.startswith("#SBATCH --")]
    kept = [
        lines[number] for number in at if re.split(r"[ =]", lines[number][len("#SBATCH --") :])[0] not in directives
    ]
    made = [
        f"#SBATCH --{key}" + (f"={_in_directive(value)}" if value is not None else "")
        for key, value in directives.items()
    ]
    chosen = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    given = [f"set -- {shlex.join(arguments)}"]
    return "\n".join([*lines[: at[0]], *kept, *made, "", *chosen, *given, *lines[at[-1] + 1 :]]) + "\n"


def _in_directive(value: str) -> str:
    """A value as sbatch reads it in a #SBATCH line: in double quotes if it has spaces."""
    return f'"{value}"' if re.search(r"\s", value) else value


def parse_job_id(answer: str) -> str:
    """The job's id in the answer of `sbatch --parsable`: "ID" or "ID;CLUSTER". Raises GradstreamError for another."""
    from gradstream.core.errors import GradstreamError

    match = re.fullmatch(r"(\d+)(;\S+)?", answer.strip())
    if match is None:
        raise GradstreamError(
            f"sbatch answered '{answer.strip()[:200]}' instead of a job's id; look with `squeue --me`"
        )
    return match[1]


def own_command() -> str:
    """The command on the nodes, which must see this installation. Raises ConfigError when its path has a space."""
    from gradstream.core.errors import ConfigError

    program = Path(sys.executable).with_name("gradstream")
    command = str(program) if program.is_file() else f"{sys.executable} -m gradstream.coordinator.cli"
    if " " in sys.executable:
        raise ConfigError(
            f"the path of {sys.executable} has a space, which the script cannot take; install it elsewhere"
        )
    return command


def make_directory(run_root: Path, name: str) -> Path:
    """Make the first directory `run_root/slurm/NAME-N` that is not there. Raises ConfigError when it cannot."""
    from gradstream.core.errors import ConfigError

    parent = run_root / "slurm"
    number = 1
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            directory = parent / f"{name}-{number}"
            try:
                directory.mkdir()
            except FileExistsError:
                number += 1
            else:
                return directory
    except OSError as error:
        raise ConfigError(f"run_root {run_root} cannot be written ({error.strerror}); set -s run_root=DIR") from None


def submit_to_slurm(recipe: Recipe, options: SlurmOptions) -> SlurmJob:
    """Render the script for a recipe with absolute paths, and submit it.

    Raises ConfigError when something is missing here or the options are wrong, GradstreamError when sbatch refuses.
    """
    from gradstream.core.data.manifest import MANIFEST_NAME
    from gradstream.core.errors import ConfigError, GradstreamError
    from gradstream.core.storage import files

    # 1. What would only fail after a wait in Slurm's queue.
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError(
            "--slurm needs Slurm's sbatch, which is not on the PATH; submit on a login node of the cluster"
        )
    check_options(options, recipe)
    path = recipe.data.path
    if files.is_local(path) and MANIFEST_NAME not in files.list_names(path):
        raise ConfigError(
            f"data.path {path} holds no {MANIFEST_NAME}; prepare the data before Slurm starts the job: "
            f"gradstream data prepare --recipe RECIPE"
        )
    command = own_command()

    # 2. The directory, with the recipe as it is now.
    directory = make_directory(Path(recipe.run_root), recipe.name)
    recipe_path = directory / "recipe.yaml"
    # JSON is YAML, and the recipe as JSON is what a coordinator stores.
    recipe_path.write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    script = directory / SCRIPT
    script.write_text(
        render(
            script_path().read_text(encoding="utf-8"),
            directives(options, recipe, directory),
            settings(options, recipe, directory, command),
            [str(recipe_path)],
        ),
        encoding="utf-8",
    )

    # 3. Slurm's answer.
    try:
        done = subprocess.run(
            [sbatch, "--parsable", str(script)], capture_output=True, text=True, timeout=SBATCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise GradstreamError(
            f"sbatch did not answer within {SBATCH_SECONDS:.0f} s; look with `squeue --me` whether it took {script}"
        ) from None
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise GradstreamError(f"sbatch refused {script}: {cause}; correct the option, or the script, and submit again")
    return SlurmJob(parse_job_id(done.stdout), directory, options.drain_seconds, options.time)
