"""`gradstream submit --slurm` without Slurm: the script, sbatch's answers, refusals. `make test-slurm` has Slurm."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from gradstream.coordinator.cli import main
from gradstream.coordinator.cli.slurm import (
    SlurmOptions,
    directives,
    num_nodes,
    parse_job_id,
    parse_sbatch,
    render,
    script_path,
    settings,
)
from gradstream.core.errors import ConfigError, GradstreamError
from gradstream.core.recipe.loading import load_recipe
from gradstream.core.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = script_path().read_text()


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """A recipe that waits for 2 servers and 2 workers."""
    return load_recipe(ROOT / "recipes" / "stdlib-gpt.yaml")


def sbatch_lines(script: str) -> dict[str, str]:
    """The #SBATCH lines of a script by option. Each option must be there once, before any command."""
    lines = script.splitlines()
    found = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")]
    pairs = [line.partition("=")[::2] for line in found]
    assert len(dict(pairs)) == len(pairs), pairs
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(f"#SBATCH --{line}") < first_command for line in found)
    return dict(pairs)


def test_the_script_drains_before_the_limit_and_may_be_queued_again() -> None:
    found = sbatch_lines(SCRIPT)
    assert found["signal"] == "B:TERM@120"
    assert {"requeue", "no-kill", "exclusive"} <= set(found)
    assert found["open-mode"] == "append"
    # The wait for the checkpoint ends before the time limit.
    assert int(SCRIPT.partition("GRADSTREAM_DRAIN_SECONDS:-")[2].partition("}")[0]) < 120


def test_a_rendered_script_has_the_options_the_settings_and_the_recipe(recipe: Recipe) -> None:
    options = SlurmOptions(
        nodes=4, time="2-12:00:00", partition="gpu", servers=3, workers_per_node=2, drain_seconds=300,
        sbatch=["gpus-per-node=2", "comment=two words", "exclusive=user", "hold"],
    )  # fmt: skip
    made = render(
        SCRIPT,
        directives(options, recipe, Path("/shared/a b")),
        settings(options, recipe, Path("/shared/a b"), "/opt/bin/gradstream"),
        ["/shared/a b/recipe.yaml"],
    )
    assert sbatch_lines(made) == sbatch_lines(SCRIPT) | {
        "job-name": recipe.name,
        "output": '"/shared/a b/slurm-%j.out"',
        "signal": "B:TERM@300",
        "nodes": "4",
        "time": "2-12:00:00",
        "partition": "gpu",
        "gpus-per-node": "2",
        "comment": '"two words"',
        "exclusive": "user",
        "hold": "",
    }
    # What comes after the settings is the script's own, unchanged.
    body = SCRIPT.partition("\nread -ra command")[2]
    assert body
    assert made.endswith(body)
    # The settings win over the environment of the person who submits.
    chosen = made.partition(body)[0] + '\nenv | grep ^GRADSTREAM_; echo "$1"\n'
    environment = {"PATH": os.environ["PATH"], "GRADSTREAM_DIR": "/elsewhere", "GRADSTREAM_HOST": "10.0.0.1"}
    said = subprocess.run(["bash", "-c", chosen], env=environment, capture_output=True, text=True, check=True).stdout
    assert sorted(said.splitlines()) == sorted([
        "GRADSTREAM_COMMAND=/opt/bin/gradstream", "GRADSTREAM_DIR=/shared/a b", "GRADSTREAM_SERVERS=3",
        "GRADSTREAM_WORKERS=2", "GRADSTREAM_DRAIN_SECONDS=280", "GRADSTREAM_HOST=10.0.0.1", "/shared/a b/recipe.yaml",
    ])  # fmt: skip
    subprocess.run(["bash", "-n"], input=made, text=True, check=True)


def test_defaults_follow_from_the_recipe(recipe: Recipe) -> None:
    def waiting_for(servers: int, workers: int) -> Recipe:
        cluster = recipe.cluster.model_copy(update={"min_servers": servers, "min_workers": workers})
        return recipe.model_copy(update={"cluster": cluster})

    assert num_nodes(SlurmOptions(), recipe) == 2
    assert num_nodes(SlurmOptions(), waiting_for(1, 5)) == 5
    assert num_nodes(SlurmOptions(workers_per_node=2), waiting_for(1, 5)) == 3
    assert num_nodes(SlurmOptions(nodes=9), waiting_for(1, 5)) == 9
    made = settings(SlurmOptions(), waiting_for(3, 2), Path("/x"), "g")
    assert made["GRADSTREAM_SERVERS"] == "3"
    # Without the option the script counts a node's GPUs.
    assert "GRADSTREAM_WORKERS" not in made
    assert "time" not in directives(SlurmOptions(), recipe, Path("/x"))


def test_answers_of_sbatch() -> None:
    assert parse_job_id("4711\n") == "4711"
    assert parse_job_id("4711;north\n") == "4711"
    for answer in ("", "Submitted batch job 4711", "4711 4712", "-1"):
        with pytest.raises(GradstreamError, match="instead of a job's id; look with `squeue --me`"):
            parse_job_id(answer)


def test_other_options_of_sbatch() -> None:
    assert parse_sbatch(["account=a b", "--qos=low", "hold"]) == {"account": "a b", "qos": "low", "hold": None}
    for given, message in (
        ("=x", "not of the form KEY=VALUE"),
        ("account=", "not of the form KEY=VALUE"),
        ("account=a\n#SBATCH --uid=0", "not of the form KEY=VALUE"),
        ("-p gpu", "not of the form KEY=VALUE"),
        ("signal=USR1", "--sbatch signal is set by --drain of gradstream submit"),
        ("nodes=3", "--sbatch nodes is set by --nodes"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_sbatch([given])


def fake_sbatch(directory: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    """Put an `sbatch` first on the PATH: a shell script."""
    program = directory / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """`submit --slurm` of a recipe whose data set is there, as far as can be seen before the job starts."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    return ["submit", "stdlib-gpt", "-s", f"run_root={tmp_path}/runs", "-s", f"data.path={tmp_path}/data", "--slurm"]


def test_a_submission_leaves_script_and_recipe_and_says_how_to_follow_it(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, 'echo "$@" > "$(dirname "$0")/given"; echo 17')
    assert main([*arguments, "-s", "seed=5", "--nodes", "3", "--time", "1:00:00"]) == 0
    said = capsys.readouterr()
    directory = tmp_path / "runs" / "slurm" / "stdlib-gpt-1"
    assert said.out == "17\n"
    assert (tmp_path / "bin" / "given").read_text() == f"--parsable {directory}/gradstream.sbatch\n"
    for line in (
        f"tail -F {directory}/slurm-17.out",
        f'GRADSTREAM_CREDENTIALS={directory}/credentials/admin gradstream status -c "$(cat {directory}/address)"',
        "120 s before the time limit of 1:00:00 training stops with a checkpoint, and Slurm queues the job again",
        f"GRADSTREAM_JOIN={directory} sbatch --nodes=1 {directory}/gradstream.sbatch",
    ):
        assert line in said.err, line
    # The recipe is that of now, with absolute paths, whatever becomes of the file.
    written = load_recipe(directory / "recipe.yaml")
    assert written == load_recipe(ROOT / "recipes" / "stdlib-gpt.yaml", [*arguments[3:6:2], "seed=5"])
    assert shlex.quote(str(directory / "recipe.yaml")) in (directory / "gradstream.sbatch").read_text()
    # The next one gets a directory of its own.
    assert main([*arguments, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "slurm_job_id": "17",
        "directory": f"{tmp_path}/runs/slurm/stdlib-gpt-2",
        "script": f"{tmp_path}/runs/slurm/stdlib-gpt-2/gradstream.sbatch",
        "log": f"{tmp_path}/runs/slurm/stdlib-gpt-2/slurm-17.out",
        "drain_seconds": 120,
    }


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--time", "4h"], 2, "--time '4h' is no time of Slurm's; write minutes, or like 4:00:00"),
        (["--drain", "10"], 2, "--drain 10 is too short"),
        (["--servers", "1"], 2, "--servers 1 is fewer than the recipe's cluster.min_servers 2"),
        (["--nodes", "1"], 2, "--nodes 1 gives 1 workers, and the recipe needs 2"),
        (["--sbatch", "time=3"], 2, "--sbatch time is set by --time"),
        (["-s", "data.path=/nothing"], 2, "prepare the data before Slurm starts the job"),
        (["--watch"], 2, "--watch is about a cluster that runs, and --slurm starts one"),
        (["-c", "10.0.0.1:7000"], 2, "--coordinator is about a cluster that runs"),
        ([], 1, "sbatch refused "),
    ],
)
def test_a_refusal_is_one_line(
    arguments: list[str],
    more: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo 'sbatch: error: no such account' >&2; exit 1")
    assert main([*arguments, *more]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_without_sbatch_and_without_slurm(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments) == 2
    assert "--slurm needs Slurm's sbatch, which is not on the PATH" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["submit", "stdlib-gpt", "--nodes", "3"]) == 2
    assert capsys.readouterr().err == "error: --nodes goes with --slurm; add that option\n"
