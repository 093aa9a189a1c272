"""The files of a source: links, hidden names, globs, names of any bytes, and counts of files that are left out."""

import os
import zipfile
from pathlib import Path

import fsspec
import pytest

from gradstream.core.data import sources
from gradstream.core.data.sources import find_files, without_password
from gradstream.core.errors import ConfigError


def write(path: Path, content: str = "some text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def found(root: Path, *names: str) -> list[str]:
    """The files that sources name, as paths below `root`."""
    return [os.path.relpath(file.path, root) for file in find_files(names).files]


def test_a_directory_of_links_as_a_hubs_cache(tmp_path: Path) -> None:
    """Snapshots hold links to blobs that have no suffix: the link's name counts."""
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for number in range(3):
        write(tmp_path / "blobs" / f"hash{number}", f"document {number}")
        (snapshot / f"{number}.jsonl.gz").symlink_to(f"../../blobs/hash{number}")
    (tmp_path / "linked").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "linked"):
        files = find_files([str(source)]).files
        assert [os.path.basename(file.path) for file in files] == ["0.jsonl.gz", "1.jsonl.gz", "2.jsonl.gz"]
        assert {(file.kind, file.compression, file.num_bytes) for file in files} == {("jsonl", "gzip", 10)}
    assert found(tmp_path, f"{snapshot}/*.gz") == [f"snapshots/0a1b/{n}.jsonl.gz" for n in range(3)]
    assert found(tmp_path, f"{snapshot}/1.jsonl.gz") == ["snapshots/0a1b/1.jsonl.gz"]


def test_links_among_files_and_directories(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt")
    write(tmp_path / "elsewhere" / "b.txt")
    write(tmp_path / "elsewhere" / "sub" / "c.txt")
    (tmp_path / "in" / "b.txt").symlink_to("../elsewhere/b.txt")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere" / "sub")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    expected = ["in/a.txt", "in/b.txt", "in/more/c.txt"]
    assert found(tmp_path, str(tmp_path / "in")) == expected
    assert found(tmp_path, str(tmp_path / "in" / "**")) == expected
    assert found(tmp_path, str(tmp_path / "in" / "**" / "*.txt")) == expected
    assert find_files([str(tmp_path / "in")]).left_out == {sources.REPEATED_DIRECTORIES: 1}
    # As cat does: a link is a file of its own, and the user is told that it comes again.
    (tmp_path / "in" / "d.txt").symlink_to("a.txt")
    files = find_files([str(tmp_path / "in")])
    assert (len(files.files), files.num_repeated) == (4, 1)


def test_links_in_circles(tmp_path: Path) -> None:
    """Each directory is read once, by its own path: ten that link to each other have ten files, not a path for every
    order."""
    for number in range(10):
        write(tmp_path / "in" / f"d{number}" / "a.txt")
        for other in range(10):
            (tmp_path / "in" / f"d{number}" / f"link{other}").symlink_to(f"../d{other}")
    expected = [f"in/d{number}/a.txt" for number in range(10)]
    for pattern in ("", "**", "**/*.txt", "**/**/*.txt"):
        assert found(tmp_path, str(tmp_path / "in" / pattern)) == expected
    assert find_files([str(tmp_path / "in")]).left_out == {sources.REPEATED_DIRECTORIES: 100}


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    (tmp_path / "c").symlink_to("c")
    message = r"b\.txt is a link to gone\.txt, which cannot be reached \(No such file.*\); restore the file or remove"
    for source in (tmp_path, tmp_path / "*.txt", tmp_path / "b.txt"):
        with pytest.raises(ConfigError, match=message):
            find_files([str(source)])
    with pytest.raises(ConfigError, match=r"c is a link to c, which cannot be reached \(Too many levels"):
        find_files([str(tmp_path / "c")])


def test_hidden_names_that_the_user_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden is what lies below a source, never what leads to it: also where the current directory is below one."""
    root = tmp_path / ".cache"
    for name in ("a.txt", "sub/b.txt", ".hidden.txt", ".git/config.txt", "sub/.d/e.txt"):
        write(root / name)
    open_names = [".cache/a.txt", ".cache/sub/b.txt"]
    for source in (root, root / "**", root / "**" / "*.txt", tmp_path / ".*" / "**"):
        assert found(tmp_path, str(source)) == open_names
    assert found(tmp_path, str(root / "*.txt")) == [".cache/a.txt"]
    assert found(tmp_path, str(root / ".*.txt")) == [".cache/.hidden.txt"]
    assert found(tmp_path, str(root / ".git")) == [".cache/.git/config.txt"]
    assert found(tmp_path, str(root / ".git" / "*")) == [".cache/.git/config.txt"]
    assert found(tmp_path, str(root / ".hidden.txt")) == [".cache/.hidden.txt"]
    assert find_files([str(root)]).left_out == {sources.HIDDEN: 3}
    assert find_files([str(root / "*")]).left_out == {sources.HIDDEN: 2, sources.GLOBBED_DIRECTORIES: 1}
    monkeypatch.chdir(root / "sub")
    assert found(tmp_path, "*.txt") == [".cache/sub/b.txt"]
    assert found(tmp_path, "**/*.txt") == [".cache/sub/b.txt"]
    assert found(tmp_path, "../*.txt") == [".cache/a.txt"]
    assert found(tmp_path, ".") == found(tmp_path, "b.txt") == [".cache/sub/b.txt"]


def test_letters_that_a_glob_would_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "[odd]" / "a*.txt")
    write(tmp_path / "[odd]" / "ab.txt")
    write(tmp_path / "o" / "c.txt")
    write(tmp_path / "zip::x.txt")
    assert found(tmp_path, f"{tmp_path}/[odd]/*.txt") == ["[odd]/a*.txt", "[odd]/ab.txt"]
    assert found(tmp_path, f"{tmp_path}/[odd]/a*.txt") == ["[odd]/a*.txt"]
    assert found(tmp_path, f"{tmp_path}/[nop]/*.txt") == ["o/c.txt"]
    assert found(tmp_path, f"{tmp_path}/zip::x.txt") == ["zip::x.txt"]
    monkeypatch.chdir(tmp_path / "[odd]")
    assert found(tmp_path, "*.txt") == ["[odd]/a*.txt", "[odd]/ab.txt"]
    assert found(tmp_path, f"file://{tmp_path}/[odd]/ab.txt", "./ab.txt") == ["[odd]/ab.txt"]


def test_dots_lead_through_links(tmp_path: Path) -> None:
    """link/.. is where the link leads, as for cat; elsewhere two ways to spell a path are one file."""
    write(tmp_path / "far" / "a.txt")
    (tmp_path / "far" / "sub").mkdir()
    (tmp_path / "link").symlink_to("far/sub")
    (file,) = find_files([f"{tmp_path}/link/../a.txt"]).files
    with file.open() as handle:
        assert handle.read() == b"some text"
    assert len(find_files([f"{tmp_path}/far/sub/../a.txt", f"{tmp_path}/far/a.txt"]).files) == 1


def test_what_no_source_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"matches no file \(left out: pipes, sockets and devices: 1\); correct"):
        find_files([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"pipe is a pipe or a device, which cannot be read twice; write it to"):
        find_files([str(tmp_path / "pipe")])
    write(tmp_path / "in" / "sub" / "a.txt")
    with pytest.raises(
        ConfigError, match=r"matches no file \(left out: directories that a glob matches \(.*descends\): 1\)"
    ):
        find_files([str(tmp_path / "in" / "*")])
    for empty in ("", " "):
        with pytest.raises(ConfigError, match="a source is empty; name a file"):
            find_files([empty])
    with pytest.raises(ConfigError, match="matches no file; correct the path or remove it"):
        find_files([str(tmp_path / "none")])


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    """It is read; for people its odd bytes are written out, so that any terminal, manifest and message can hold it."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(path).write_text("some text")
    for source in (path, str(tmp_path), str(tmp_path / "caf*")):
        (file,) = find_files([source]).files
        assert file.name == f"{tmp_path}/caf\\xe9.txt"
        with file.open() as handle:
            assert handle.read() == b"some text"
    assert without_password(path) == f"{tmp_path}/caf\\xe9.txt"
    assert without_password("s3://me:secret@café/\ud800") == "s3://café/\\ud800"


def test_hidden_names_elsewhere(request: pytest.FixtureRequest) -> None:
    root = f"/{request.node.name}/.cache"
    filesystem = fsspec.filesystem("memory")
    for name in ("a.txt", "sub/b.txt", ".git/c.txt", "sub/.d.txt"):
        filesystem.pipe_file(f"{root}/{name}", b"some text")
    for source in (root, f"{root}/**"):
        files = find_files([f"memory:/{source}"])
        assert [file.path for file in files.files] == [f"{root}/a.txt", f"{root}/sub/b.txt"]
        assert files.left_out[sources.HIDDEN] >= 2
    assert [file.path for file in find_files([f"memory:/{root}/.g*/*"]).files] == [f"{root}/.git/c.txt"]


def test_archives_with_files_of_one_name(tmp_path: Path) -> None:
    for archive in ("a.zip", "b.zip"):
        with zipfile.ZipFile(tmp_path / archive, "w") as opened:
            opened.writestr("sub/x.txt", archive)
            opened.writestr(".hidden/y.txt", "hidden")
    names = [f"zip://**/*.txt::{tmp_path}/a.zip", f"zip://**/*.txt::{tmp_path}/b.zip"]
    files = find_files([*names, names[0]])
    assert [file.name for file in files.files] == [f"zip://sub/x.txt::{tmp_path}/{name}" for name in ("a.zip", "b.zip")]
    assert [file.open().read() for file in files.files] == [b"a.zip", b"b.zip"]
    assert files.left_out[sources.HIDDEN] == 3
