"""Where the paths of a recipe may lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradstream.core.errors import ConfigError
from gradstream.core.paths import VARIABLE, AllowedPaths


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "sets").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "data" / "out").symlink_to(tmp_path / "secret")
    return tmp_path / "data"


def test_without_prefixes_any_path_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    AllowedPaths.of_environment("/only/where/there/are/others").check("data.path", "/etc/passwd")


def test_what_lies_below_is_allowed(data: Path) -> None:
    allowed = AllowedPaths([str(data), "s3://bucket/models"])
    for path in ("", "/sets", "/sets/..", "/not-there-yet/x", "/"):
        allowed.check("data.path", f"{data}{path}")
    allowed.check("data.path", f"file://{data}/sets")
    allowed.check("base_model", "s3://bucket/models/one")
    allowed.check("data.validation_path", None)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "{data}/../secret/key.pem",
        "{data}/out/key.pem",
        "{data}-too",
        "file:///etc/passwd",
        "file://{data}/out",
        "simplecache::file://{data}/sets",
        "zip://key.pem::{data}/sets/a.zip",
        "s3://bucket/models-too/one",
        "s3://bucket/models/../other",
        "s3://bucket",
        "http://127.0.0.1:7000/",
        "{data}/\0",
        "~",
    ],
)
def test_what_leads_elsewhere_is_refused(data: Path, path: str) -> None:
    allowed = AllowedPaths([str(data), "s3://bucket/models"])
    with pytest.raises(ConfigError, match=r"data\.path"):
        allowed.check("data.path", path.format(data=data))


def test_the_environment_names_the_prefixes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f" {data} , s3://bucket")
    allowed = AllowedPaths.of_environment("/uploads")
    for path in (f"{data}/sets", "s3://bucket/x", "/uploads/y"):
        allowed.check("data.path", path)
    with pytest.raises(ConfigError, match=f"{data} or s3://bucket or /uploads"):
        allowed.check("data.path", "/elsewhere")
