"""The bounds of a recipe's paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from gradstream.core.data.sources import SourceFile, open_filesystem
from gradstream.core.errors import ConfigError
from gradstream.core.storage import files
from gradstream.core.storage.paths import SCHEMES_VARIABLE, VARIABLE, AllowedPaths, check_scheme, own


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "sets").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "data" / "out").symlink_to(tmp_path / "secret")
    return tmp_path / "data"


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "local:///x", "relative/x", "/a/b:c", "~/x"])
def test_without_prefixes_any_local_path_will_do(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    AllowedPaths.of_environment("/only/where/there/are/others").check("data.path", path)


URLS = [
    "ftp://127.0.0.1:1/x",
    "http://169.254.169.254/latest",
    "s3://bucket/x",
    "data:,x",
    "FTP://host/x",
    "simplecache::http://host/x",
    "zip://a::/tmp/x.zip",
    "zip:///tmp/x.zip",
    "memory://x",
    "github://owner:repo@main/x",
    "smb://host/share",
    "hf://models/x",
    "/tmp/ftp://host/x",
]


@pytest.mark.parametrize("path", URLS)
def test_without_prefixes_no_url_is_opened(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(SCHEMES_VARIABLE, raising=False)
    with pytest.raises(
        ConfigError, match=r"data\.path .* is a URL, and this service opens local paths alone; .*SCHEMES"
    ):
        AllowedPaths.of_environment().check("data.path", path)


def test_a_scheme_is_allowed_by_its_name(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv(SCHEMES_VARIABLE, "s3, GS")
    for path in ("s3://bucket/x", "gs://bucket/x", "S3://bucket/x", "/tmp/x"):
        AllowedPaths.of_environment().check("data.path", path)
    for path in ("http://host/x", "simplecache::s3://bucket/x", "s3a://bucket/x"):
        with pytest.raises(ConfigError, match=r"data\.path"):
            AllowedPaths.of_environment().check("data.path", path)
    monkeypatch.setenv(VARIABLE, str(data))
    AllowedPaths.of_environment().check("data.path", "s3://bucket/x")
    with pytest.raises(ConfigError, match=r"data\.path"):
        AllowedPaths.of_environment().check("data.path", "/etc/passwd")


def test_a_service_opens_no_other_url_wherever_it_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may name one too: the base that a checkpoint's manifest says it began from."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(SCHEMES_VARIABLE, raising=False)
    check_scheme("ftp://127.0.0.1:1/x")  # people's own commands read what they are told to
    monkeypatch.setenv(SCHEMES_VARIABLE, "")
    for path in URLS:
        with pytest.raises(ConfigError, match=r"the path .* is a URL"):
            files.file_system(path)
        with pytest.raises(ConfigError, match=r"the path .* is a URL"):
            open_filesystem(path)
    assert files.file_system("/tmp/x")[1] == "/tmp/x"


def test_an_open_file_is_judged_by_where_it_lies(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that is put in a file's place after the path was checked leads nowhere."""
    (data.parent / "secret" / "key.pem").write_text("the key")
    (data / "sets" / "manifest.json").write_text("{}")
    (data / "inside").symlink_to(data / "sets" / "manifest.json")
    (data / "outside").symlink_to(data.parent / "secret" / "key.pem")
    monkeypatch.setenv(VARIABLE, str(data))
    for path in (data / "sets" / "manifest.json", data / "inside"):
        assert files.read_bytes(str(path)) == b"{}"
    for path in (data / "outside", data / "out" / "key.pem", data.parent / "secret" / "key.pem"):
        for read in (files.read_bytes, files.sha256, files.open_local, lambda name: list(files.pieces(name))):
            with pytest.raises(ConfigError, match=r"leads to .*secret/key\.pem, which is not below"):
                read(str(path))
    source = SourceFile("x", LocalFileSystem(), str(data / "outside"), 1)
    with pytest.raises(ConfigError, match="which is not below"):
        source.open()
    own(str(data.parent / "secret"))
    assert files.read_bytes(str(data / "outside")) == b"the key"


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
        "s3://bucket/models/%2e%2e/other",
        "s3://bucket/models/%252e%252e/other",
        "s3://bucket/models/..\\other",
        "S3://bucket/models",
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
