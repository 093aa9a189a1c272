"""Checks of deploy/ that need neither a Docker engine nor Slurm nor Ray.

`make test-compose`, `make test-slurm` and `make test-ray` are the tests with them.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from gradstream.coordinator.cli import serve
from gradstream.core.errors import ConfigError
from gradstream.core.extras import MODULES
from gradstream.core.recipe.fine_tuning_recipe import load_any_recipe

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
ONE_SHOT = "credentials"
RENEWAL = "renewal"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text())["services"])


def volumes(service: dict[str, Any]) -> dict[str, str]:
    """Volume's name (a variable's default) by where it is mounted."""
    found = {}
    for entry in service["volumes"]:
        name, target = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", entry).split(":")[:2]
        found[target] = name
    return found


def module(path: str) -> Any:
    """A module of deploy/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"deploy_{Path(path).stem}", ROOT / "deploy" / path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_all_variables_are_documented_with_their_defaults() -> None:
    head, _, body = COMPOSE.read_text().partition("\nx-build:")
    used = dict(re.findall(r"\$\{(\w+)(?::?-([^}]*))?\}", body))
    assert used
    for name, default in used.items():
        assert name in head, name
        if default and "://" not in default:
            assert f"{name}={default}" in head, (name, default)
    documented = set(re.findall(r"\b(GRADSTREAM_[A-Z_]+|BASE_IMAGE|TORCH_INDEX_GPU|TORCH_INDEX|TORCH)\b", head))
    assert documented <= set(used)


def test_only_the_one_shot_sees_the_authority_and_each_service_its_own_credentials(services: dict[str, Any]) -> None:
    seen: dict[str, list[str]] = {}
    for name, service in services.items():
        if name in (ONE_SHOT, RENEWAL):
            assert service["network_mode"] == "none"
            continue
        mounted = volumes(service)
        assert "authority" not in mounted.values(), name
        own = [volume for volume in mounted.values() if volume.endswith("-credentials")]
        assert own == [mounted["/credentials"]], name
        seen.setdefault(own[0], []).append(name)
    assert sorted(seen.values()) == [
        ["cli"],
        ["coordinator"],
        ["fine-tuning"],
        ["parameter-server"],
        ["worker", "worker-gpu"],
    ]
    assert set(seen) <= set(volumes(services[ONE_SHOT]).values())


def test_credentials_are_renewed_without_an_up(services: dict[str, Any]) -> None:
    once, again = services[ONE_SHOT], services[RENEWAL]
    assert (again["command"], again["volumes"], again["image"]) == (once["command"], once["volumes"], once["image"])
    assert 0 < float(again["environment"]["GRADSTREAM_EVERY_HOURS"]) <= 24
    assert again["restart"] == "unless-stopped"
    assert again["depends_on"] == {ONE_SHOT: {"condition": "service_completed_successfully"}}


def test_every_volume_is_declared(services: dict[str, Any]) -> None:
    declared = set(yaml.safe_load(COMPOSE.read_text())["volumes"])
    assert {volume for service in services.values() for volume in volumes(service).values()} == declared


def test_services_are_confined(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service
        for port in service.get("ports", []):
            assert port.startswith("${GRADSTREAM_BIND:-127.0.0.1}:"), name


def test_services_start_after_the_coordinator_is_healthy(services: dict[str, Any]) -> None:
    assert services["coordinator"]["depends_on"] == {ONE_SHOT: {"condition": "service_completed_successfully"}}
    for name in ("parameter-server", "worker", "worker-gpu", "fine-tuning"):
        assert services[name]["depends_on"] == {"coordinator": {"condition": "service_healthy"}}
        assert services[name]["mem_limit"]
        assert services[name]["stop_grace_period"]
        assert services[name]["restart"] == "unless-stopped"


def test_services_have_time_to_finish_what_they_write(services: dict[str, Any]) -> None:
    """The engine kills a container only after its role's --grace."""
    for name, grace in (
        ("coordinator", serve.GRACE_SECONDS),
        ("worker", serve.GRACE_SECONDS),
        ("worker-gpu", serve.GRACE_SECONDS),
        ("parameter-server", serve.SERVER_GRACE_SECONDS),
    ):
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > grace + 5


def test_the_image_of_the_command_line_has_no_torch() -> None:
    image = module("image.py")
    everything = image.requirements(ROOT / "pyproject.toml", "all")
    light = image.requirements(ROOT / "pyproject.toml", "light")
    assert set(light) < set(everything)
    for name in (module.replace("_", "-") for modules in MODULES.values() for module in modules):
        assert any(each.lower().startswith(name) for each in everything), f"{name} is no requirement any more"
        assert not any(each.lower().startswith(name) for each in light)


def test_the_dockerfile_runs_nothing_as_root_and_names_every_service() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    runtime = text[text.index("AS runtime") :]
    assert re.findall(r"^USER (.*)$", runtime, re.MULTILINE) == ["10001:10001"]
    for target in ("coordinator", "parameter-server", "worker", "fine-tuning"):
        assert re.search(rf"^FROM service AS {target}\nEXPOSE \d+\nHEALTHCHECK ", runtime, re.MULTILINE), target
    assert "RUN --mount" not in text


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "recipes").glob("*.yaml"), ROOT / "deploy" / "test-recipe.yaml"]),
    ids=lambda path: path.name,
)
def test_every_recipe_that_comes_along_is_valid(path: Path) -> None:
    assert load_any_recipe(path, ["base_model=/somewhere"] if "finetune" in path.name else []).name


UNITS = {
    "gradstream-coordinator.service": (serve.coordinator, "coordinator"),
    "gradstream-parameter-server@.service": (serve.parameter_server, "parameter-server"),
    "gradstream-worker@.service": (serve.worker, "worker"),
    "gradstream-fine-tuning.service": (serve.fine_tuning, "fine-tuning"),
}
SYSTEMD = ROOT / "deploy" / "systemd"


def unit(name: str) -> dict[str, list[str]]:
    """The settings of a unit's [Service], each with all its values."""
    found: dict[str, list[str]] = {}
    for line in (SYSTEMD / name).read_text().partition("[Service]")[2].partition("\n[")[0].splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_each_role_has_a_unit() -> None:
    assert {path.name for path in SYSTEMD.glob("*.service")} == set(UNITS)
    group: Any = typer.main.get_command(serve.app)
    assert {role for _, role in UNITS.values()} == set(group.commands)


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_starts_its_role_with_options_that_there_are(name: str) -> None:
    (command,) = unit(name)["ExecStart"]
    variables = dict(re.findall(r"^(\w+)=(.*)$", (SYSTEMD / "gradstream.env").read_text(), re.MULTILINE))
    filled = re.sub(r"\$\{?(\w+)\}?", lambda match: variables[match[1]], command)
    filled = filled.replace("%l", "host").replace("%i", "0")
    program, serving, role, *words = filled.split()
    assert (program, serving, role) == ("/opt/gradstream/bin/gradstream", "serve", UNITS[name][1])
    group: Any = typer.main.get_command(serve.app)
    with group.make_context("serve", [role]) as context:
        group.get_command(context, role).make_context(role, words, parent=context)


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_stops_its_role_as_compose_does(services: dict[str, Any], name: str) -> None:
    role = UNITS[name][1]
    settings = unit(name)
    grace = inspect.signature(UNITS[name][0]).parameters.get("grace")
    assert settings["TimeoutStopSec"] == [services[role]["stop_grace_period"].removesuffix("s")]
    assert grace is None or int(settings["TimeoutStopSec"][0]) > grace.default + 5
    assert (settings["Restart"], settings["KillMode"]) == (["always"], ["mixed"])
    assert (settings["User"], settings["NoNewPrivileges"]) == (["gradstream"], ["yes"])
    assert settings["EnvironmentFile"][0] == "/etc/gradstream/gradstream.env"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for name in UNITS:
        text = (SYSTEMD / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/gradstream/bin/gradstream", sys.executable))
    command = ["systemd-analyze", "verify", *(str(tmp_path / name) for name in UNITS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_paths_are_limited_for_services_and_not_for_people(services: dict[str, Any]) -> None:
    """`cli` prepares data from wherever its user says."""
    serving = {"coordinator", "parameter-server", "worker", "worker-gpu", "fine-tuning"}
    limited = {name for name, service in services.items() if "GRADSTREAM_PATHS" in service.get("environment", {})}
    assert limited == serving


SBATCH = ROOT / "deploy" / "slurm" / "gradstream.sbatch"


def test_every_setting_of_the_slurm_script_is_documented_with_its_default() -> None:
    head, _, body = SBATCH.read_text().partition("\n#SBATCH")
    used = dict(re.findall(r"\$\{(GRADSTREAM_\w+):-([^}$]*)", body))
    assert set(used) >= {"GRADSTREAM_COMMAND", "GRADSTREAM_SERVERS", "GRADSTREAM_DRAIN_SECONDS"}
    documented = dict(re.findall(r"^#   (GRADSTREAM_\w+)=(\S*)  ", head, re.MULTILINE))
    # This default holds another variable.
    assert used.pop("GRADSTREAM_DIR") == "runs/slurm/"
    assert documented == used | {"GRADSTREAM_DIR": ""}
    page = (ROOT / "docs" / "slurm-and-ray.md").read_text()
    assert [name for name in documented if f"`{name}`" not in page] == []


@pytest.mark.parametrize("role", ["coordinator", "parameter-server", "worker"])
def test_the_slurm_script_starts_roles_with_options_that_there_are(role: str) -> None:
    text = SBATCH.read_text().replace("\\\n", " ")
    (own,) = re.findall(rf"^ *keep {role} (.*)$", text, re.MULTILINE)
    common = ["--listen", "host:0"] + ([] if role == "coordinator" else ["--coordinator", "host:1"])
    assert all(f" {option} " in text for option in common[::2])
    words = [
        *common,
        *(word if word.startswith("--") else "1" for word in re.sub(r'"[^"]*(\$\(.*\))?"', "x", own).split()),
    ]
    group: Any = typer.main.get_command(serve.app)
    with group.make_context("serve", [role]) as context:
        group.get_command(context, role).make_context(role, words, parent=context)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_takes_the_slurm_script() -> None:
    # SC2317: functions that run on other nodes seem unreachable.
    result = subprocess.run(
        ["shellcheck", "--exclude=SC2317", str(SBATCH)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


def test_bundles_and_memory_of_roles_on_ray() -> None:
    launch = module("ray/launch.py")
    assert launch.server_bundles(3, 2.0) == [{"CPU": 2.5}, {"CPU": 2.0}, {"CPU": 2.0}]
    assert launch.worker_bundles(2, 4.0, 0.0) == [{"CPU": 4.0}] * 2
    assert launch.worker_bundles(1, 4.0, 1.0) == [{"CPU": 4.0, "GPU": 1.0}]
    node = {"CPU": 4.0, "memory": 1000.0}
    # Roles that fill a node have 80 % of its memory.
    assert [launch.memory_of(cpus, node) for cpus in (1.0, 4.0, 9.0)] == [200, 800, 800]
    assert launch.memory_of(1.0, {"memory": 1000.0}) == 800


def test_a_coordinator_on_ray_keeps_its_port_on_its_host_alone() -> None:
    launch = module("ray/launch.py")
    assert launch.listen_address("10.0.0.1", "10.0.0.1:4711") == "10.0.0.1:4711"
    assert launch.listen_address("10.0.0.2", "10.0.0.1:4711") == "10.0.0.2:0"
    assert launch.listen_address("10.0.0.1", "") == "10.0.0.1:0"


def test_the_example_for_kuberay_gives_options_that_there_are() -> None:
    job = yaml.safe_load((ROOT / "deploy" / "ray" / "rayjob.yaml").read_text())["spec"]
    launch = module("ray/launch.py")
    python, script, *words = job["entrypoint"].split()
    assert (python, Path(script).name) == ("python", "launch.py")
    options = launch.parser().parse_args(words)
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert options.directory.is_relative_to(container["volumeMounts"][0]["mountPath"])
    # There is room for all bundles on the smallest number of nodes.
    (workers,) = cluster["workerGroupSpecs"]
    cpus = workers["minReplicas"] * float(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    bundles = launch.server_bundles(options.servers, options.cpus_per_server)
    bundles += launch.worker_bundles(options.workers, options.cpus_per_worker, options.gpus_per_worker)
    assert sum(bundle["CPU"] for bundle in bundles) <= cpus
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert min(grace, launch.STOP_SECONDS) > serve.SERVER_GRACE_SECONDS + 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stdlib-gpt", "--workers", "1"], "--workers 1 is fewer than the 2 that the recipe needs"),
        (["stdlib-gpt", "-s", "trainin.x=1"], "did you mean 'training'?"),
        (["stdlib-gpt", "--memory-per-worker", "4XB"], "is not a size"),
    ],
)
def test_wrong_options_on_ray_are_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    launch = module("ray/launch.py")
    with pytest.raises(ConfigError, match=re.escape(message)):
        launch.Driver(launch.parser().parse_args([*words, "--directory", str(tmp_path)]))
    assert list(tmp_path.iterdir()) == []
