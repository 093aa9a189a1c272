"""Where `gradstream dev --resume` finds the state of an earlier run, and what it says when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny import tiny_recipe

from gradstream.coordinator.cli.app import main
from gradstream.coordinator.cli.local.earlier_run import cluster_directory, find_earlier_run
from gradstream.coordinator.cli.role_checks import state_directory
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.coordinator.state.state import JobRecord
from gradstream.core.errors import ConfigError
from gradstream.core.storage.state_lock import lock_directory


def write_state(directory: Path, run_directory: Path) -> None:
    recipe = tiny_recipe(run_directory, run_directory.parent)
    state = SqliteState(directory / "state")
    state.create_job(JobRecord(run_directory.name, "tiny", recipe.model_dump_json(), "{}", str(run_directory), 1))
    state.close()


def test_the_state_is_found_with_the_job_or_where_a_killed_dev_left_it(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny-1"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds no state of job tiny-1; only a job that `gradstream dev` has run"):
        find_earlier_run("tiny-1", tmp_path / "runs")
    killed = cluster_directory(tmp_path / "runs", 17)
    write_state(cluster_directory(tmp_path / "runs", 16), tmp_path / "runs" / "other-1")
    write_state(killed, run)
    found = find_earlier_run("tiny-1", tmp_path / "runs")
    assert (found.directory, found.run_directory, found.recipe.name) == (killed, run, "tiny")
    # It goes on from a directory of its own, and nothing of the killed one stays.
    (tmp_path / "new").mkdir()
    found.move_state(tmp_path / "new")
    assert not killed.exists()
    (tmp_path / "new" / "state").rename(run / "state")
    assert find_earlier_run(str(run), tmp_path).directory == run


def test_a_state_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "tiny-1"
    write_state(run, run)
    with lock_directory(run / "state", "coordinator"), pytest.raises(ConfigError, match="another coordinator"):
        find_earlier_run("tiny-1", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "name a RECIPE to start a job, or --resume JOB to go on with one"),
        (["stdlib-gpt", "--resume", "stdlib-gpt-1"], "name a RECIPE to start a job, or --resume JOB to go on with one"),
        (["stdlib-gpt", "--steps", "9"], "--steps goes with --resume; for a new job say -s training.num_steps=9"),
        (["--resume", "tiny-1", "-s", "seed=1"], "a job goes on with the recipe that it has"),
        (["--resume", "tiny-7"], "there is no job directory"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dev", *arguments, "--run-root", str(tmp_path)]) == 2
    assert line in capsys.readouterr().err


def test_the_state_directory_of_a_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    usual, chosen = tmp_path / ".local" / "state" / "gradstream", tmp_path / "state"
    assert state_directory(None, "gradstream", {}) == usual
    assert state_directory(None, "gradstream", {"XDG_STATE_HOME": "relative"}) == usual
    assert state_directory(None, "gradstream", {"XDG_STATE_HOME": str(chosen)}) == chosen / "gradstream"
    assert state_directory(Path("~/mine"), "gradstream", {"XDG_STATE_HOME": str(chosen)}) == tmp_path / "mine"
    # The state of an earlier version is not lost from sight.
    usual.mkdir(parents=True)
    assert state_directory(None, "gradstream", {"XDG_STATE_HOME": str(chosen)}) == usual
    (chosen / "gradstream").mkdir(parents=True)
    assert state_directory(None, "gradstream", {"XDG_STATE_HOME": str(chosen)}) == chosen / "gradstream"
