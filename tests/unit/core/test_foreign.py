"""The boundary around parsers of other languages: a panic, which is not an Exception, becomes an error of one line."""

import ast
import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tokenizers import Tokenizer

from gradstream.coordinator.data import tokenization
from gradstream.core.errors import ConfigError, DataError
from gradstream.core.foreign import Guarded, panics_caught, parsing
from gradstream.core.pretrained.tokenizer import load_tokenizer
from gradstream.core.recipe.fine_tuning import Base
from gradstream.core.rpc.channel import listen, new_server
from gradstream.core.rpc.errors import answering
from gradstream.proto.v1 import jobs_pb2, jobs_pb2_grpc
from gradstream.services.fine_tuning.examples.encoding import Encoder
from gradstream.services.fine_tuning.threads import in_thread

ROOT = Path(__file__).parents[3]
END = "<|endoftext|>"


def content(**changes: Any) -> bytes:
    """A tokenizer.json of a small BPE; `changes` replace parts of it, those of `model` within the model."""
    model = {"type": "BPE", "vocab": {END: 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]}
    model.update(changes.pop("model", {}))
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree = {"version": "1.0", "added_tokens": [{"id": 0, "content": END, **special}], "model": model, **changes}
    for part in ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        tree.setdefault(part, None)
    return json.dumps(tree).encode()


PANICS_WHEN_LOADED = content(model={"continuing_subword_prefix": "éé"})
PANICS_WHEN_ENCODING = content(pre_tokenizer={"type": "FixedLength", "length": 0})
PANICS_WHEN_DECODING = content(decoder={"type": "Strip", "content": "a", "start": 50, "stop": 50})


def base_with(directory: Path, tokenizer: bytes) -> Base:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_bytes(tokenizer)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return Base(kind="huggingface", path=str(directory), title="x", files=(), sha256="0" * 64)


def panic() -> None:
    """What a parser of another language does with some data: the real thing."""
    Tokenizer.from_str(PANICS_WHEN_LOADED.decode())


def test_a_panic_is_no_exception_so_that_the_boundary_is_needed() -> None:
    with pytest.raises(BaseException, match="out of range") as caught:
        panic()
    assert not isinstance(caught.value, Exception)


def test_a_panic_is_the_error_that_the_caller_names() -> None:
    with (
        pytest.raises(ConfigError, match=r"x\.json is bad \(PanicException: range end index .*\)") as caught,
        parsing(lambda cause: ConfigError(f"x.json is bad ({cause})")),
    ):
        panic()
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="a parser crashed on its input"), panics_caught():
        panic()


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_how_python_ends_a_program_or_a_task_passes(ending: type[BaseException]) -> None:
    with pytest.raises(ending), parsing(lambda cause: ConfigError(cause)):
        raise ending
    with pytest.raises(ending), panics_caught():
        raise ending


def test_every_method_of_a_guarded_object_is_inside() -> None:
    guarded = Guarded(Tokenizer.from_str(PANICS_WHEN_ENCODING.decode()), lambda cause: ConfigError(f"refused: {cause}"))
    guarded.encode_special_tokens = True
    assert guarded.encode_special_tokens is True
    assert guarded.token_to_id("ab") == 3
    with pytest.raises(ConfigError, match=r"refused: .*chunk size must be non-zero"):
        guarded.encode("ab")
    with pytest.raises(ConfigError, match="refused: "):
        guarded.encode_batch_fast(["ab"])


def test_a_base_whose_tokenizer_panics_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be used \(PanicException"):
        load_tokenizer(base_with(tmp_path / "load", PANICS_WHEN_LOADED))
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be used \(PanicException"):
        Encoder(load_tokenizer(base_with(tmp_path / "encode", PANICS_WHEN_ENCODING)))
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be used \(PanicException"):
        Encoder(load_tokenizer(base_with(tmp_path / "decode", PANICS_WHEN_DECODING))).decode([1])


def test_a_data_set_is_not_prepared_with_a_tokenizer_that_panics(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(PANICS_WHEN_LOADED)
    with pytest.raises(ConfigError, match=r"is not a tokenizer\.json \(PanicException"):
        tokenization.load(str(path), END)
    path.write_bytes(PANICS_WHEN_ENCODING)
    described = tokenization.load(str(path), END)
    for num_processes in (1, 2):
        with pytest.raises(ConfigError, match=r"the tokenizer cannot encode the documents \(PanicException"):
            list(tokenization.encode(["ab"], described, num_processes))


async def test_a_thread_that_panics_ends_whoever_waits_with_an_exception() -> None:
    with pytest.raises(DataError, match="a parser crashed"):
        await in_thread(panic)


async def test_a_call_in_which_a_parser_panics_is_answered() -> None:
    """gRPC catches Exception alone: the caller would wait for its deadline."""

    class Servicer(jobs_pb2_grpc.JobsServiceServicer):
        async def ListJobs(self, request: Any, context: Any) -> Any:
            async with answering(context):
                await asyncio.to_thread(panic)

    server = new_server()
    jobs_pb2_grpc.add_JobsServiceServicer_to_server(Servicer(), server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    try:
        stub: Any = jobs_pb2_grpc.JobsServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListJobs(jobs_pb2.ListJobsRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "a parser crashed on its input" in str(caught.value.details())
    finally:
        await channel.close()
        await server.stop(0)


def foreign_imports(path: Path) -> set[str]:
    """The Rust parsers that a module imports to run, not for its types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in only_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module in ("tokenizers", "safetensors"):
            found.update(alias.name for alias in node.names)
    return found & {"Tokenizer", "safe_open"}


def test_every_module_that_parses_with_rust_code_uses_the_boundary() -> None:
    modules = [
        path for part in ("core", "coordinator", "services", "worker", "client") for path in (ROOT / part).rglob("*.py")
    ]
    parsing_modules = [path for path in modules if foreign_imports(path)]
    assert len(parsing_modules) >= 6
    outside = [str(path.relative_to(ROOT)) for path in parsing_modules if "core.foreign import" not in path.read_text()]
    assert not outside
