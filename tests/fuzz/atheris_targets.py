"""Every hand-written parser as a function of bytes, for test_bytes.py and for atheris (`make fuzz`, __main__.py)."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from google.protobuf.message import DecodeError
from support.bases import full_checkpoint, save_base
from support.fuzzing import check_line
from support.micro import MICRO_LLAMA, micro_plan

from gradstream.client import GradstreamError
from gradstream.client._export import ExportWriter
from gradstream.coordinator.cli.options import parse_bit_rate, parse_size
from gradstream.coordinator.data.inspection import inspect
from gradstream.coordinator.data.sources import NotTextError, read_documents
from gradstream.coordinator.telemetry.timelines import TimelineFiles
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.codecs import CODEC_NAMES, codec_named
from gradstream.core.data.manifest import parse_manifest
from gradstream.core.data.sources import list_files
from gradstream.core.errors import CheckpointError, ConfigError, DataError, ProtocolError
from gradstream.core.metrics.http import parse_head
from gradstream.core.plan.plan import Plan
from gradstream.core.pretrained import base as base_model
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig, load_any_recipe, parse_fine_tuning_recipe
from gradstream.core.recipe.loading import load_recipe, parse_recipe
from gradstream.core.wire.frames import Assembler, frames, parse
from gradstream.proto.v1 import jobs_pb2, plan_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.fine_tuning.examples.dataset import load_prepared
from gradstream.services.fine_tuning.examples.reading import read_rows
from gradstream.services.fine_tuning.store import Record, Store


@dataclass(frozen=True)
class Target:
    """A parser. `refusals` are the errors by which it may refuse; `seeds` are valid inputs."""

    parse: Callable[[bytes], object]
    refusals: tuple[type[GradstreamError], ...]
    seeds: Callable[[], list[bytes]]

    def check(self, data: bytes) -> bool:
        """Parse; whether it was taken. Anything but a refusal in good order is raised."""
        try:
            self.parse(data)
        except self.refusals as error:
            check_line(error)
            return False
        return True


TARGETS: dict[str, Target] = {}


def target(
    *refusals: type[GradstreamError], seeds: Callable[[], list[bytes]]
) -> Callable[[Callable[[bytes], object]], Callable[[bytes], object]]:
    """Make a function a target."""

    def add(parse: Callable[[bytes], object]) -> Callable[[bytes], object]:
        TARGETS[parse.__name__] = Target(parse, refusals, seeds)
        return parse

    return add


@cache
def scratch() -> Path:
    """A directory for as long as the process lives."""
    holder = tempfile.TemporaryDirectory(prefix="gradstream-fuzz-", ignore_cleanup_errors=True)
    globals()["_scratch"] = holder
    return Path(holder.name)


def in_file(name: str, data: bytes) -> Path:
    """A file with these bytes."""
    path = scratch() / name
    path.write_bytes(data)
    return path


# -- the network -------------------------------------------------------------------------------------------------------


def _messages() -> list[bytes]:
    payload = np.arange(100, dtype=np.uint8)
    header = pb.WeightsHeader(version=3, bundle=1, payload_bytes=100, crc32c=7, fragment_bytes=[100])
    alone = pb.WeightsHeader(version=3, checkpoint=True)
    streams = list(frames(header, [payload], 40)), list(frames(header, [payload])), list(frames(alone, []))
    return [b"".join(len(message).to_bytes(2, "little") + message for message in stream) for stream in streams]


@target(ProtocolError, seeds=_messages)
def wire(data: bytes) -> None:
    """Messages of a push or pull stream: two bytes of length, then one, and so on."""
    assembler: Assembler[pb.WeightsHeader] = Assembler()
    at = 0
    while at + 2 <= len(data):
        length = int.from_bytes(data[at : at + 2], "little")
        encoded, piece = parse(data[at + 2 : at + 2 + length])
        at += 2 + length
        if encoded is not None:
            try:
                header = pb.WeightsHeader.FromString(bytes(encoded))
            except DecodeError:
                return
            if header.payload_bytes > 1 << 20:  # what checking it against the plan is for
                return
            assembler.begin(header)
        assembler.add(piece)


@target(ProtocolError, ConfigError, DataError, seeds=lambda: [micro_plan().to_proto().SerializeToString()])
def plan(data: bytes) -> None:
    """A plan as nodes get it."""
    try:
        message = plan_pb2.Plan.FromString(data)
    except DecodeError:
        return
    Plan.from_proto(message).to_proto()


def _payloads() -> list[bytes]:
    values = torch.randn(1500, generator=torch.Generator().manual_seed(0))
    return [bytes([number]) + codec_named(name).encode(values).tobytes() for number, name in enumerate(CODEC_NAMES)]


@target(ProtocolError, seeds=_payloads)
def codecs(data: bytes) -> None:
    """A payload of 1500 elements; the first byte says of which codec."""
    if not data:
        return
    out = torch.full((1500,), 0.5)
    payload = np.frombuffer(bytearray(data[1:]), dtype=np.uint8)
    try:
        codec_named(CODEC_NAMES[data[0] % len(CODEC_NAMES)]).decode(payload, out)
    except ProtocolError:
        assert (out == 0.5).all(), "a refused payload has left something"
        raise


# -- recipes and manifests ---------------------------------------------------------------------------------------------

RECIPE = {
    "name": "fuzz",
    "run_root": "/tmp/runs",
    "model": {"config": {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 64}},
    "training": {"num_steps": 4, "num_slots": 2, "global_batch": 4, "microbatch": 2, "sequence_length": 32},
    "optimizer": {"kind": "adamw", "learning_rate": 0.001, "betas": [0.9, 0.95]},
    "codec": {"push": "int8", "pull": "delta-int8"},
    "data": {"path": "/tmp/data", "prepare": {"sources": ["a", "b"], "num_shards": 2, "vocab_size": 64}},
    "validation": {"num_samples": 4},
    "pipeline": {"stages": "auto"},
    "fine_tuning": {
        "method": "lora",
        "lora": {"rank": 2, "target_modules": ["q_proj"]},
        "base": {
            "kind": "huggingface",
            "path": "/tmp/base",
            "title": "base",
            "sha256": "0" * 64,
            "files": [{"file": "model.safetensors", "num_bytes": 1, "sha256": "0" * 64}],
        },
    },
}
TASK = {
    "name": "task",
    "base_model": "job:one@3",
    "data": {"path": "/tmp/task.jsonl", "format": "auto", "bad_rows": "skip"},
    "training": {"num_epochs": 2.5, "sequence_length": 32},
    "lora": {"rank": 2, "alpha": 4.0, "target_modules": "all-linear"},
}
SHARD = {
    "file": "train-00000.tokens",
    "index_file": "train-00000.index",
    "split": "train",
    "num_tokens": 64,
    "num_documents": 2,
    "num_bytes": 128,
    "sha256": "0" * 64,
    "index_sha256": "0" * 64,
}
MANIFEST = {
    "token_dtype": "uint16",
    "vocab_size": 64,
    "end_of_text_id": 0,
    "tokenizer_sha256": "0" * 64,
    "shards": [SHARD, SHARD | {"file": "v.tokens", "index_file": "v.index", "split": "validation"}],
    "sources": ["somewhere"],
}


@target(ConfigError, seeds=lambda: [json.dumps(RECIPE).encode()])
def recipe_json(data: bytes) -> None:
    """A recipe as it is submitted. What is taken can be written, and read again as the same."""
    found = parse_recipe(data.decode("utf-8", "replace"))
    assert parse_recipe(found.model_dump_json()) == found


@target(ConfigError, seeds=lambda: [json.dumps(TASK).encode()])
def fine_tuning_recipe_json(data: bytes) -> None:
    """A fine-tuning recipe as it is sent."""
    found = parse_fine_tuning_recipe(data.decode("utf-8", "replace"))
    assert parse_fine_tuning_recipe(found.model_dump_json()) == found


def _yaml_seeds() -> list[bytes]:
    import yaml

    demo = Path(__file__).resolve().parents[2] / "recipes" / "stdlib-gpt.yaml"
    return [demo.read_bytes(), yaml.safe_dump(RECIPE).encode(), yaml.safe_dump(TASK).encode()]


@target(ConfigError, seeds=_yaml_seeds)
def recipe_yaml(data: bytes) -> None:
    """A recipe file, of either kind."""
    load_any_recipe(in_file("recipe.yaml", data))


@target(ConfigError, seeds=lambda: [b"training.num_steps=5", b"data.prepare.sources=[a, b]", b"model.config={a: 1}"])
def override(data: bytes) -> None:
    """`-s key.sub=value`."""
    in_file("base.yaml", json.dumps(RECIPE).encode())
    load_recipe(scratch() / "base.yaml", [data.decode("utf-8", "surrogateescape")])


@target(DataError, seeds=lambda: [json.dumps(MANIFEST).encode()])
def data_manifest(data: bytes) -> None:
    """manifest.json of a data set."""
    found = parse_manifest(data)
    assert parse_manifest(found.model_dump_json()) == found


@target(DataError, ConfigError, seeds=lambda: [json.dumps(MANIFEST).encode()])
def data_set(data: bytes) -> None:
    """A data set's directory with this manifest."""
    directory = scratch() / "data-set"
    directory.mkdir(exist_ok=True)
    (directory / "manifest.json").write_bytes(data)
    shutil.copy(base_directory() / "tokenizer.json", directory)
    (directory / "train-00000.tokens").write_bytes(bytes(128))
    inspect(str(directory))


# -- checkpoints and bases ---------------------------------------------------------------------------------------------


@cache
def checkpoint_directory() -> Path:
    """A checkpoint to damage."""
    return Path(full_checkpoint(scratch() / "checkpoint", MICRO_LLAMA))


@target(CheckpointError, seeds=lambda: [(checkpoint_directory() / "manifest.json").read_bytes()])
def checkpoint_manifest(data: bytes) -> None:
    """manifest.json of a checkpoint beside its file."""
    directory = scratch() / "checkpoint-manifest"
    if not directory.exists():
        shutil.copytree(checkpoint_directory(), directory)
    (directory / "manifest.json").write_bytes(data)
    reader = CheckpointReader(str(directory))
    for entry in reader.manifest.tensors[:3]:
        reader.read("weight", entry.name, 0, min(100, entry.tensor().num_elements))


@cache
def base_directory() -> Path:
    """A Hugging Face directory to damage."""
    return save_base(scratch() / "base", chat=True, max_shard_size="20KB")


BASE_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00004.safetensors",
    "chat_template.jinja",
)


def _base_seeds() -> list[bytes]:
    directory = base_directory()
    names = [name for name in BASE_FILES if (directory / name).exists()]
    return [bytes([BASE_FILES.index(name)]) + (directory / name).read_bytes() for name in names]


@target(ConfigError, CheckpointError, seeds=_base_seeds)
def base(data: bytes) -> None:
    """A Hugging Face directory of which one file, named by the first byte, holds these bytes."""
    if not data:
        return
    directory = scratch() / "hostile-base"
    if directory.exists():
        shutil.rmtree(directory)
    shutil.copytree(base_directory(), directory)
    (directory / BASE_FILES[data[0] % len(BASE_FILES)]).write_bytes(data[1:])
    found, _ = base_model.find_base(str(directory))
    base_model.load_tokenizer(found)
    reader = base_model.BaseReader(found)
    reader.read(reader.names()[0], 0, 4)


# -- examples ----------------------------------------------------------------------------------------------------------

ROWS = (
    b'{"prompt": "a b", "completion": "c"}\n{"prompt": "\\u00e4", "completion": "d", "more": [1]}\n',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n\n',
    b'\xef\xbb\xbf{"text": "a b c"}\n',
)


def parquet_rows() -> bytes:
    """A Parquet file with rows."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    sink = io.BytesIO()
    parquet.write_table(arrow.table({"prompt": ["a", "b"], "completion": ["c", None]}), sink)
    return sink.getvalue()


@target(DataError, ConfigError, seeds=lambda: list(ROWS))
def examples_jsonl(data: bytes) -> None:
    """A file of examples."""
    (file,) = list_files([str(in_file("rows.jsonl", data))])
    for _ in read_rows(file, ExamplesConfig(path=file.path)):
        pass


@target(
    DataError, ConfigError, seeds=lambda: [b'{"text": "a b c"}\n\n{"text": null}', b'\xef\xbb\xbf{"text": "\\ud800"}']
)
def documents_jsonl(data: bytes) -> None:
    """A file of documents for pretraining; each has a UTF-8 encoding."""
    (file,) = list_files([str(in_file("documents.jsonl", data))])
    for text in read_documents(file, "text"):
        text.encode()


@target(DataError, ConfigError, seeds=lambda: [b'[{"text": "a"}, {"text": "b"}]', b'{"text": "a"}\n{"text": "b"}\n'])
def examples_json(data: bytes) -> None:
    """A file of which only the content says that it is JSON, as examples and as documents."""
    (file,) = list_files([str(in_file("rows.json", data))])
    for _ in read_rows(file, ExamplesConfig(path=file.path)):
        pass
    try:
        list(read_documents(file, "text"))
    except NotTextError:
        pass


@target(DataError, ConfigError, seeds=lambda: [parquet_rows()])
def examples_parquet(data: bytes) -> None:
    """A Parquet file of examples."""
    (file,) = list_files([str(in_file("rows.parquet", data))])
    for _ in read_rows(file, ExamplesConfig(path=file.path)):
        pass


@target(DataError, ConfigError, seeds=lambda: [b"a text\n", "ä €".encode(), b"\xef\xbb\xbfx"])
def examples_text(data: bytes) -> None:
    """A text file as examples, and as a document."""
    (file,) = list_files([str(in_file("rows.txt", data))])
    for _ in read_rows(file, ExamplesConfig(path=file.path)):
        pass
    try:
        list(read_documents(file, "text", 50))
    except NotTextError:
        pass


PREPARED = {
    "manifest.json": json.dumps(MANIFEST).encode(),
    "examples.json": b'{"format": "chat", "numRows": 3, "badRows": ["x"], "sha256": ["00"]}',
    "prompts.jsonl": b'[[1, 2, 3], "prompt", "expected"]\n[[], "", ""]\n',
}


@target(DataError, seeds=lambda: [bytes([number]) + content for number, content in enumerate(PREPARED.values())])
def prepared_examples(data: bytes) -> None:
    """A directory of prepared examples of which one file, named by the first byte, holds these bytes."""
    if not data:
        return
    directory = scratch() / "prepared"
    directory.mkdir(exist_ok=True)
    for name, content in PREPARED.items():
        (directory / name).write_bytes(content)
    (directory / list(PREPARED)[data[0] % len(PREPARED)]).write_bytes(data[1:])
    load_prepared(str(directory))


# -- what services keep ------------------------------------------------------------------------------------------------


@target(ConfigError, seeds=lambda: [Record(name="one", created_unix_ms=1, recipe_json="{}").model_dump_json().encode()])
def store(data: bytes) -> None:
    """A fine-tuning's record as a service finds it when it starts."""
    directory = scratch() / "store" / "fine-tunings" / "one"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "record.json").write_bytes(data)
    Store(scratch() / "store").close()


def _timelines() -> list[bytes]:
    directory = scratch() / "timeline-seed"
    files = TimelineFiles(directory)
    for version in range(3):
        entry = jobs_pb2.GetTimelineResponse(worker="worker-0")
        entry.timeline.version, entry.timeline.communication_us = version, 10
        entry.timeline.spans.add(kind=8, begin_unix_us=5, duration_us=3, slot=0, stage=version, microbatch=0)  # type: ignore[arg-type]
        files.append(entry)
    return [path.read_bytes() for path in sorted(directory.glob("*"))]


@target(seeds=_timelines)
def timelines(data: bytes) -> None:
    """A segment of timelines as a coordinator finds it: what is damaged is left out, never refused."""
    directory = scratch() / "timelines"
    directory.mkdir(exist_ok=True)
    for path in directory.glob("*"):
        path.unlink()
    (directory / "00000001.records").write_bytes(data)
    files = TimelineFiles(directory)
    entry = jobs_pb2.GetTimelineResponse(worker="worker-0")
    entry.timeline.spans.add(kind=8)  # type: ignore[arg-type]
    files.append(entry)
    assert files.index(), "what was written after a damaged segment is lost"


def _pieces() -> list[bytes]:
    pieces = [("config.json", 2, b"{}"), ("model.safetensors", 5, b"abc"), ("model.safetensors", 5, b"de")]
    messages = [jobs_pb2.ExportCheckpointResponse(file=f, file_bytes=n, payload=p) for f, n, p in pieces]
    return [b"".join(bytes([m.ByteSize()]) + m.SerializeToString() for m in messages)]


def _split(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        yield data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]


@target(ProtocolError, ConfigError, CheckpointError, seeds=_pieces)
def export(data: bytes) -> None:
    """The messages of an export as a client takes them: one byte of length each. It is there whole or not at all."""
    parent = scratch() / "export"
    shutil.rmtree(parent, ignore_errors=True)
    writer = ExportWriter(parent / "model")
    try:
        for encoded in _split(data):
            try:
                writer.write(jobs_pb2.ExportCheckpointResponse.FromString(encoded))
            except DecodeError:
                break
        writer.finish()
    except GradstreamError:
        writer.discard()
        assert not list(parent.iterdir()), "a refused export has left something"
        raise
    finally:
        writer.discard()


# -- the command line --------------------------------------------------------------------------------------------------


@target(ConfigError, seeds=lambda: [b"4GiB", b"1.5g", b"500MB", b"4096", b" 7 ki "])
def size(data: bytes) -> None:
    """`--memory 4GiB`."""
    assert 0 < parse_size(data.decode("utf-8", "surrogateescape")) < 2**63


@target(ConfigError, seeds=lambda: [b"1Gb/s", b"100Mbit/s", b"2.5g", b"10kbps"])
def bit_rate(data: bytes) -> None:
    """`--link 1Gb/s`."""
    assert 0 < parse_bit_rate(data.decode("utf-8", "surrogateescape")) < 1e18


@target(ProtocolError, seeds=lambda: [b"GET /metrics?a=b HTTP/1.1\r\nAccept: */*\r\nAuthorization: Bearer x\r\n\r\n"])
def http(data: bytes) -> None:
    """The head of a request for metrics."""
    request = parse_head(data)
    assert request.path.startswith("/")
    assert "?" not in request.path
