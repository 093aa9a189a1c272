"""The fine-tuning service's state is durable, however the service ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradstream.core.errors import ConfigError
from gradstream.core.recipe.fine_tuning import Base
from gradstream.services.fine_tuning.store import Completed, Completions, Record, Store

BASE = Base(kind="huggingface", path="/models/tiny", title="tiny", files=(), sha256="ab" * 32)


def test_records_survive(tmp_path: Path) -> None:
    store = Store(tmp_path)
    sample = Completed(prompt="p\u2028q", expected="e", generated="g\ud7ff")
    first = Record(name="first", created_unix_ms=1, recipe_json="{}", base=BASE, losses={0: 2.5, 4: 1.25})
    second = Record(name="second", created_unix_ms=2, recipe_json="{}")
    store.create(first)
    store.create(second)
    done = first.changed(
        state="finished",
        checkpoints={4: "/runs/first-1/checkpoints/step-00000004"},
        best_version=4,
        after=Completions(num_prompts=1, num_exact=0, samples=(sample,)),
    )
    store.save(done)
    store.close()
    again = Store(tmp_path)
    assert again.all() == [second, done]
    assert again.get("first") == done
    assert again.get("third") is None


def test_one_service_at_a_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match=f"another fine-tuning service \\(process {os.getpid()}\\) holds"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_a_new_one_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create(Record(name="task", created_unix_ms=1, recipe_json="{}", state="failed"))
    (store.directory("task") / "data-1").mkdir()
    new = Record(name="task", created_unix_ms=2, recipe_json="{}")
    store.create(new)
    assert store.get("task") == new
    assert [path.name for path in store.directory("task").iterdir()] == ["record.json"]


def test_each_try_has_its_own_directory(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create(Record(name="task", created_unix_ms=1, recipe_json="{}"))
    first = store.next_data_directory("task")
    assert not first.exists()
    first.mkdir()
    (first / "half").write_text("x")
    second = store.next_data_directory("task")
    assert second != first
    assert not first.exists()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create(Record(name="task", created_unix_ms=1, recipe_json="{}"))
    path = store.directory("task") / "record.json"
    store.close()
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match=f"{path} is damaged .*; restore it, or move"):
        Store(tmp_path)
    # It has let go of the directory.
    path.unlink()
    path.parent.rmdir()
    assert Store(tmp_path).all() == []


def test_what_was_under_way_is_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.temporary / "export-x").mkdir()
    store.close()
    assert list(Store(tmp_path).temporary.iterdir()) == []


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """Whatever the moment, each record is the old or the new one."""
    program = (
        "import sys; from pathlib import Path; from gradstream.services.fine_tuning.store import Record, Store\n"
        "store = Store(Path(sys.argv[1])); record = Record(name='task', created_unix_ms=1, recipe_json='x' * 50_000)\n"
        "store.create(record)\n"
        "print('begun', flush=True)\n"
        "for version in range(1, 1_000_000): store.save(record.changed(losses={version: float(version)}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    record = tmp_path / "fine-tunings" / "task" / "record.json"
    while b'"losses": {\n' not in record.read_bytes():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    found = Store(tmp_path).get("task")
    assert found is not None
    assert [version == loss for version, loss in found.losses.items()] == [True]
