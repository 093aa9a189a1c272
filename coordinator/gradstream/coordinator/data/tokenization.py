"""Train or load the tokenizer of a data set, and encode documents in parallel.

A trained tokenizer is a byte-level BPE (Sennrich et al. 2016; byte level as in GPT-2): it can encode every text.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from gradstream.coordinator.data.end_of_text import find_end_of_text
from gradstream.coordinator.data.sources import Format, NotTextError, read_documents
from gradstream.core.data.sources import SourceFile, open_filesystem
from gradstream.core.errors import ConfigError, DataError, one_line
from gradstream.core.foreign import Guarded, parsing

END_OF_TEXT = "<|endoftext|>"
"""The end of text of a trained tokenizer if the recipe names no other."""
TRAINED = "the trained tokenizer"
TOKENIZER_NAME = "tokenizer.json"
RARE_CHARACTERS = ("\ua66e", "\U00013000", "\u2603")  # a Slavonic letter, a hieroglyph, a snowman
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
SAMPLE_BYTES = 4 << 20  # a larger sample changes the merges little and takes 0.3 s per MB
SMALL_FILE_BYTES = 64 << 10
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024
BATCHES_PER_PROCESS = 3  # in flight: one being encoded, one waiting, one being written


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A tokenizer.json and its entries for the manifest.

    `vocab_size` is the largest id plus one. `origin` is the file or option that names the end of text.
    """

    content: bytes
    vocab_size: int
    end_of_text_id: int
    end_of_text: str = ""
    origin: str = ""

    @property
    def token_dtype(self) -> str:
        """The numpy name of the smallest type that holds every id."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True, slots=True)
class Document:
    """An encoded document: its token ids, with the end of text, as little-endian bytes."""

    tokens: bytes
    num_tokens: int
    num_unknown: int = 0
    """number of unknown tokens, for text outside of the vocabulary"""


def load(path: str, end_of_text: str | int | None = None) -> TokenizerFile:
    """Load an existing tokenizer.json from any fsspec path; a directory's path stands for the tokenizer.json in it.

    Its end of text comes from the files beside it, unless `end_of_text` names a token or an id. Raises ConfigError when
    the file cannot be read, is not a tokenizer, or when no file names the end of text.
    """
    filesystem, inner = open_filesystem(path)
    try:
        if filesystem.isdir(inner):
            path, inner = f"{path.rstrip('/')}/{TOKENIZER_NAME}", f"{inner.rstrip('/')}/{TOKENIZER_NAME}"
        with filesystem.open(inner, "rb") as handle:
            content: bytes = handle.read()
    except Exception as error:  # every fsspec backend raises its own kind
        raise ConfigError(
            f"tokenizer {path} cannot be read ({one_line(error)}); give the path of a tokenizer.json"
        ) from None
    vocabulary, special = _vocabulary(content, path)
    end = find_end_of_text(path, vocabulary, special, end_of_text)
    return TokenizerFile(content, max(vocabulary.values()) + 1, end.id, end.text, end.origin)


def _vocabulary(content: bytes, origin: str) -> tuple[dict[str, int], list[str]]:
    """The ids of all tokens of a tokenizer.json, and its special tokens. Raises ConfigError."""
    from tokenizers import Tokenizer

    with parsing(lambda cause: ConfigError(f"{origin} is not a tokenizer.json ({cause}); save the tokenizer again")):
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
    if not vocabulary:
        raise ConfigError(f"{origin} has an empty vocabulary; save the tokenizer again")
    return vocabulary, [added[number].content for number in sorted(added) if added[number].special]


def train(
    files: list[SourceFile],
    text_field: str,
    vocab_size: int,
    max_bytes: int | None,
    progress: Callable[[int], None],
    *,
    fmt: Format = "auto",
    end_of_text: str = END_OF_TEXT,
) -> TokenizerFile:
    """Train a byte-level BPE on a sample of at most SAMPLE_BYTES of the documents; `end_of_text` is its special token.

    The same files give the same bytes. `progress` is called with the number of bytes of text sampled so far. Raises
    ConfigError for a vocabulary that is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size {vocab_size} is too small; a byte-level vocabulary has at least {SMALLEST_VOCABULARY} entries"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(files, text_field, max_bytes, progress, fmt), trainer)
    content = tokenizer.to_str(pretty=True).encode("utf-8")
    vocabulary, _ = _vocabulary(content, TRAINED)
    return TokenizerFile(content, max(vocabulary.values()) + 1, vocabulary[end_of_text], end_of_text, TRAINED)


def _sample(
    files: list[SourceFile],
    text_field: str,
    max_bytes: int | None,
    progress: Callable[[int], None],
    fmt: Format = "auto",
) -> Iterator[str]:
    """Yield text from all parts of the corpus, without reading all of it.

    Files are visited in a scrambled order that depends only on their number. Each gives the beginning of its text, in
    proportion to its size; small files give all of their text.
    """
    if max_bytes is not None:  # sample only the text that will be tokenized: about the first max_bytes
        reached, kept = 0, 0
        while kept < len(files) and reached < max_bytes:
            reached += files[kept].num_bytes
            kept += 1
        files = files[:kept]
    total = max(1, sum(file.num_bytes for file in files))
    budget = min(SAMPLE_BYTES, max_bytes or SAMPLE_BYTES)
    sampled = 0
    order = sorted(range(len(files)), key=lambda index: blake2b(str(index).encode(), digest_size=8).digest())
    for index in order:
        left = min(budget - sampled, max(SMALL_FILE_BYTES, SAMPLE_BYTES * files[index].num_bytes // total))
        try:
            for text in read_documents(files[index], text_field, fmt=fmt):
                if text:
                    # First a fast cut by characters, each at least one byte, then the exact cut by bytes.
                    piece = text[:left].encode("utf-8")[:left].decode("utf-8", "ignore")
                    size = len(piece.encode("utf-8"))
                    left, sampled = left - max(1, size), sampled + size
                    yield piece
                    progress(sampled)
                if left <= 0:
                    break
        except NotTextError:
            continue  # the file is counted when the corpus is read
        if sampled >= budget:
            return


def encode(texts: Iterable[str], tokenizer: TokenizerFile, num_processes: int) -> Generator[Document, None, None]:
    """Encode documents in the given order, which does not depend on the number of processes.

    At most BATCHES_PER_PROCESS batches of about BATCH_BYTES for each process are in memory at once. A single process is
    the caller's own; several are spawned. Raises DataError when a spawned process dies.
    """
    setup = (tokenizer.content, tokenizer.token_dtype, tokenizer.end_of_text_id)
    if num_processes == 1:
        encoder = _Encoder(*setup)
        for batch in _batches(texts):
            yield from encoder.encode(batch)
        return
    pool = ProcessPoolExecutor(
        num_processes, mp_context=multiprocessing.get_context("spawn"), initializer=_start_process, initargs=setup
    )
    in_flight: deque[Future[list[Document]]] = deque()
    try:
        for batch in _batches(texts):
            in_flight.append(pool.submit(_encode_in_process, batch))
            if len(in_flight) >= BATCHES_PER_PROCESS * num_processes:
                yield from in_flight.popleft().result()
        while in_flight:
            yield from in_flight.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a tokenizing process ended early; free some memory, or in a script of yours call prepare under "
            "`if __name__ == '__main__':`, which spawned processes need"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Encoder:
    """A tokenizer that encodes whole documents: without truncation, padding or template."""

    def __init__(self, content: bytes, token_dtype: str, end_of_text_id: int):
        from tokenizers import Tokenizer

        self._tokenizer: Any = Guarded(
            Tokenizer.from_str(_with_special(content.decode("utf-8"), end_of_text_id)), _refused
        )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<|endoftext|>" in a document is encoded as ordinary text: a document must not be able to end itself.
        self._tokenizer.encode_special_tokens = True
        self._dtype = np.dtype(token_dtype).newbyteorder("<")
        self._end_of_text_id = end_of_text_id
        self._unknown_id = unknown_id(content)

    def encode(self, texts: list[str]) -> list[Document]:
        documents = []
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            tokens = np.array([*encoding.ids, self._end_of_text_id], self._dtype)
            if (tokens[:-1] == self._end_of_text_id).any():
                raise DataError(
                    f"a document holds the end of text (token {self._end_of_text_id}) as ordinary text, which the "
                    f"tokenizer cannot tell apart; list the token in added_tokens of its tokenizer.json"
                )
            num_unknown = 0 if self._unknown_id is None else int((tokens == self._unknown_id).sum())
            documents.append(Document(tokens.tobytes(), len(tokens), num_unknown))
        return documents


def _refused(cause: str) -> ConfigError:
    return ConfigError(f"the tokenizer cannot encode the documents ({cause}); save it again, or have one trained")


def unknown_id(content: bytes) -> int | None:
    """The token of a tokenizer.json for text outside of its vocabulary; None if it has none."""
    tree = json.loads(content)
    model = tree.get("model") or {}
    if isinstance(model.get("unk_id"), int):  # Unigram
        return int(model["unk_id"])
    words = model.get("vocab")
    added = {token["content"]: token["id"] for token in tree.get("added_tokens") or []}
    found = added.get(model.get("unk_token"), words.get(model.get("unk_token")) if isinstance(words, dict) else None)
    return found if isinstance(found, int) else None


def drops_characters(content: bytes) -> bool:
    """Whether a tokenizer drops a character that its vocabulary lacks."""
    from tokenizers import Tokenizer

    tokenizer: Any = Guarded(Tokenizer.from_str(content.decode("utf-8")), _refused)
    return any(not tokenizer.encode(rare, add_special_tokens=False).ids for rare in RARE_CHARACTERS)


def _with_special(text: str, end_of_text_id: int) -> str:
    """Make the end of text a special token of a tokenizer.json: a document's text then never encodes to it."""
    tree = json.loads(text)
    for token in tree.get("added_tokens") or []:
        if token["id"] == end_of_text_id and not token.get("special"):
            token["special"] = True
            return json.dumps(tree)
    return text


_process_encoder: _Encoder | None = None


def _start_process(content: bytes, token_dtype: str, end_of_text_id: int) -> None:
    """Set up a spawned process: one thread, and Ctrl-C is left to the parent."""
    global _process_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _process_encoder = _Encoder(content, token_dtype, end_of_text_id)


def _encode_in_process(texts: list[str]) -> list[Document]:
    assert _process_encoder is not None
    return _process_encoder.encode(texts)
