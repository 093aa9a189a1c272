"""The command line of `pip install gradstream` alone: what works without an extra, and which extra an error names."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from canned_fine_tunings import CannedFineTunings, serving_fine_tunings
from canned_jobs import CannedJobs, canned_job
from packaging.requirements import Requirement
from support.base_install import ROOT, BaseInstall

from gradstream.coordinator.cli.app import COMMANDS
from gradstream.core.extras import ALL, MODULES, explained, installed, require
from gradstream.proto.v1 import jobs_pb2

NEEDS_AN_EXTRA = [
    ("dev stdlib-gpt", "all"),
    ("generate .", "node"),
    ("finetune dev stdlib-finetune", "node"),
    ("recipes validate stdlib-gpt", "node"),
    ("init stdlib: --size 3M --time 1h --out mine.yaml", "node"),
    ("data prepare stdlib: --out x", "node"),
    ("data inspect x", "node"),
    ("serve coordinator", "node"),
    ("serve parameter-server", "node"),
    ("serve worker", "node"),
    ("serve fine-tuning", "node"),
    ("trace --gantt x.png", "plot"),
    ("plot tiny-1", "plot"),
]
WORKS_WITH_A_CLUSTER = [
    "ls",
    "status",
    "logs",
    "events",
    "top --count 1",
    "trace --to trace.json",
    "submit stdlib-gpt",
    "watch tiny-1",
    "plan stdlib-gpt",
    "metrics tiny-1",
    "pause tiny-1",
    "replay tiny-1",
    "replan tiny-1",
    "rm tiny-1 --dry-run",
    "resume tiny-1",
    "stop tiny-1",
    "ckpt ls",
    "ckpt export tiny-1 exported",
    "doctor",
]
WORKS_ALONE = {"certs", "login", "logout", "health"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseInstall:
    return BaseInstall(tmp_path_factory.mktemp("base") / "packages")


def test_the_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) == {*MODULES, ALL, "dev"}
    for extra, modules in MODULES.items():
        wanted = {Requirement(text).name.replace("-", "_") for text in extras[extra]}
        assert wanted == set(modules)
    assert extras[ALL] == [f"gradstream[{','.join(MODULES)}]"]
    assert installed() == list(MODULES)


def test_every_command_is_tried_below() -> None:
    tried = {arguments.split()[0] for arguments in [*WORKS_WITH_A_CLUSTER, *(words for words, _ in NEEDS_AN_EXTRA)]}
    assert tried | WORKS_ALONE == {name for name, *_ in COMMANDS}


def test_the_base_install_has_no_package_of_an_extra(base: BaseInstall) -> None:
    names = [name for modules in MODULES.values() for name in modules]
    program = f"import importlib.util; print([name for name in {names} if importlib.util.find_spec(name)])"
    assert base.python("-c", program).stdout == "[]\n"


def test_the_client_is_imported(base: BaseInstall) -> None:
    result = base.python("-c", "import gradstream.client; print(gradstream.client.Client('h:1').address)")
    assert (result.returncode, result.stdout) == (0, "h:1\n"), result.stderr


def test_every_command_has_help(base: BaseInstall) -> None:
    names = [name for name, *_ in COMMANDS]
    program = (
        "from gradstream.coordinator.cli import main\n"
        f"print('failed:', [name for name in {names} if main([name, '--help']) != 0])"
    )
    result = base.python("-c", program)
    assert result.stdout.splitlines()[-1] == "failed: []", result.stderr


@pytest.mark.parametrize(("arguments", "extra"), NEEDS_AN_EXTRA)
def test_what_needs_an_extra_names_it(base: BaseInstall, arguments: str, extra: str) -> None:
    result = base.gradstream(*arguments.split())
    assert (result.returncode, result.stdout) == (2, "")
    expected = (
        rf"error: `gradstream {arguments.split()[0]}[^`]*` needs (torch|matplotlib).* not installed; "
        rf"run pip install 'gradstream\[{extra}\]'\n"
    )
    assert re.fullmatch(expected, result.stderr), result.stderr


@pytest.mark.parametrize("arguments", WORKS_WITH_A_CLUSTER)
def test_what_talks_to_a_cluster_works(
    base: BaseInstall,
    jobs: CannedJobs,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
) -> None:
    if arguments.startswith("watch"):
        jobs.jobs = [canned_job(state=jobs_pb2.JOB_STATE_FINISHED)]  # else it goes on
    monkeypatch.chdir(tmp_path)
    result = base.gradstream(*arguments.split(), "-c", address)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_pictures_need_the_extra_plot_alone(
    tmp_path_factory: pytest.TempPathFactory, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawing = BaseInstall(tmp_path_factory.mktemp("plot") / "packages", "plot")
    result = drawing.gradstream("plot", "tiny-1", "-c", address)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tiny-1-loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_fine_tuning_service_generates_with_a_job(base: BaseInstall, address: str) -> None:
    with serving_fine_tunings(CannedFineTunings()) as service:
        result = base.gradstream("generate", "tiny-1", "-p", "def ", "--service", service, "-c", address)
    assert (result.returncode, result.stdout) == (0, "def return a + b\n"), result.stderr
    result = base.gradstream("generate", "tiny-1", "--service", service, "-c", address)
    assert result.returncode == 7
    assert f"fine-tuning service {service} does not answer" in result.stderr


def test_a_plan_without_a_coordinator_names_both_ways(base: BaseInstall) -> None:
    result = base.gradstream("plan", "stdlib-gpt", "-c", "127.0.0.1:1")
    assert result.returncode == 7
    assert "or plan here, without a coordinator, after pip install 'gradstream[node]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_credentials_and_recipes_work(base: BaseInstall, tmp_path: Path) -> None:
    for arguments in (
        ["recipes", "ls"],
        ["recipes", "show", "stdlib-gpt", "--resolved"],
        ["init", "stdlib:", "--size", "3M", "--out", str(tmp_path / "mine.yaml")],
        ["certs", "init", str(tmp_path / "authority")],
    ):
        result = base.gradstream(*arguments)
        assert result.returncode == 0, result.stderr
    for arguments in (["login", "127.0.0.1:1"], ["logout", "127.0.0.1:1"], ["health", "127.0.0.1:1"]):
        assert "ModuleNotFoundError" not in base.gradstream(*arguments).stderr
    pack = base.gradstream("certs", "issue", "viewer", "--name", "ada", "--authority", str(tmp_path / "authority"))
    assert pack.returncode == 0, pack.stderr


def test_doctor_names_the_extras_that_are_not_there(base: BaseInstall) -> None:
    lines = base.gradstream("doctor").stdout.splitlines()
    assert "to train or serve here: pip install 'gradstream[node]'" in next(line for line in lines if "node" in line)
    assert not any(line.startswith("fail") for line in lines)


def test_an_import_that_failed_is_explained_by_its_extra() -> None:
    """As of a command that has asked for nothing beforehand."""
    failed = explained("this command", ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"))
    assert str(failed) == "this command needs torch, which is not installed; run pip install 'gradstream[node]'"
    assert failed is not None
    assert failed.exit_code == 2
    assert explained("this command", ModuleNotFoundError("No module named 'x'", name="x")) is None


def test_nothing_is_refused_where_all_is_installed() -> None:
    require("this", *MODULES)
    assert importlib.util.find_spec("torch") is not None
