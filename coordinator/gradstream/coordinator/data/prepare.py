"""Prepare a data set: turn text into a manifest, a tokenizer and data shards of token ids.

The phases are: list the files, train or load the tokenizer, tokenize and write, publish. The result depends only on the
input and the options, not on the number of processes. Memory is bounded by the batches in flight and the largest
document.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from fractions import Fraction
from hashlib import blake2b
from typing import Any, Literal

from gradstream.coordinator.data import tokenization
from gradstream.coordinator.data.inspection import DataSummary, SplitSummary, inspect, load_manifest, verify
from gradstream.coordinator.data.output import SplitWriter
from gradstream.coordinator.data.pieces import Division, divide, enough_documents
from gradstream.coordinator.data.sources import NOT_TEXT, Corpus
from gradstream.core.data.manifest import Manifest
from gradstream.core.data.output import Output, Split
from gradstream.core.data.sources import FoundFiles, SourceFile, find_files, is_local, open_filesystem, without_password
from gradstream.core.errors import ConfigError, DataError
from gradstream.core.recipe.recipe import PrepareConfig

__all__ = [
    "DataSummary",
    "PrepareProgress",
    "SplitSummary",
    "inspect",
    "is_validation",
    "load_manifest",
    "prepare",
    "verify",
]

# For fewer bytes, starting processes takes longer than tokenizing.
SPLIT = "long documents were split"
"""How the note of a split begins."""
SERIAL_BYTES = 4 << 20
PROGRESS_INTERVAL_BYTES = 256 << 10
TOKENIZER_FILE = "tokenizer.json"
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """The progress of a preparation. Bytes are bytes of text for the tokenizer, of stored files for tokenizing."""

    phase: Literal["tokenizer", "tokenize", "done"]
    bytes_done: int = 0
    bytes_total: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_skipped_files: int = 0
    """files left out because they are not UTF-8 text"""
    end_of_text: str = ""
    """the token that ends a document, its id, and the file or option that names it; for people"""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """number of sources or parts of them that are not in the data set, by reason"""
    notes: tuple[str, ...] = ()
    """notes that people should check, a sentence each"""


def prepare(
    options: PrepareConfig,
    out: str,
    progress: Callable[[PrepareProgress], None] = lambda _: None,
    *,
    num_processes: int | None = None,
    force: bool = False,
) -> Manifest:
    """Make the data set that `options` describe in the directory `out` (any fsspec path); return its manifest.

    `num_processes` is the number of tokenizing processes, at most one per core; None chooses. `force` replaces a data
    set at `out`. `progress` is called often, in this thread. After an error or an interrupt no partial files remain.

    Raises ConfigError (sources, tokenizer, options or `out`) and DataError (contents), each with one line.
    """
    # Phase 1: list the files. Errors in the paths are raised before anything is written.
    found = find_files(options.sources)
    files = _without_output(found, out)
    if isinstance(options.end_of_text, int) and options.tokenizer is None:
        raise ConfigError(
            f"end_of_text {options.end_of_text} is an id, which a trained tokenizer gives out itself; name its text"
        )
    # The division depends on the number and the length of the documents.
    division = divide(
        Corpus(files, options.text_field, options.max_bytes, options.format).measure(
            enough_documents(options.num_shards, options.validation_fraction)
        ),
        options.num_shards,
        options.validation_fraction,
    )
    corpus = Corpus(files, options.text_field, options.max_bytes, options.format, division.piece_bytes)
    with Output(out, force) as output:
        # Phase 2: the tokenizer.
        tokenizer = _make_tokenizer(options, files, corpus.stored_bytes, progress)
        end_of_text = f"{tokenizer.end_of_text!r} (id {tokenizer.end_of_text_id}), by {tokenizer.origin}"
        state = PrepareProgress("tokenizer", end_of_text=end_of_text)
        file = output.create(TOKENIZER_FILE)
        with output.explained():
            file.write(tokenizer.content)
            tokenizer_sha256 = file.close()

        # Phase 3: tokenize, and write in the order of the documents.
        writers = {split: SplitWriter(output, split, options.num_shards) for split in SPLITS}
        num_unknown = 0
        processes = _num_processes(num_processes, corpus.stored_bytes)
        reported = -PROGRESS_INTERVAL_BYTES
        # Closed here, not by the garbage collector: the processes must end before the files are removed.
        with closing(tokenization.encode(corpus, tokenizer, processes)) as documents:
            for index, document in enumerate(documents):
                num_unknown += document.num_unknown
                writers["validation" if is_validation(index, division.validation_fraction) else "train"].add(document)
                if corpus.stored_bytes_done - reported >= PROGRESS_INTERVAL_BYTES:
                    reported = corpus.stored_bytes_done
                    progress(_tokenizing(state, corpus, writers))
        left_out = dict(sorted((found.left_out + corpus.tally.left_out).items()))
        _check_counts(left_out, writers)

        # Phase 4: publish.
        shards = tuple(shard for writer in writers.values() for shard in writer.close())
        manifest = Manifest.model_validate(
            {
                **_contents(options, corpus, division, tokenizer),
                "tokenizer_file": TOKENIZER_FILE,
                "tokenizer_sha256": tokenizer_sha256,
                "shards": shards,
                "left_out": left_out,
            }
        )
        output.publish(manifest)
    state = replace(_tokenizing(state, corpus, writers), phase="done", bytes_done=corpus.stored_bytes)
    progress(replace(state, left_out=left_out, notes=_notes(options, found, corpus, division, tokenizer, num_unknown)))
    return manifest


def _make_tokenizer(
    options: PrepareConfig, files: list[SourceFile], stored_bytes: int, progress: Callable[[PrepareProgress], None]
) -> tokenization.TokenizerFile:
    """Load the tokenizer that the options name, or train one. Raises ConfigError, DataError."""
    if options.tokenizer is not None:
        return tokenization.load(options.tokenizer, options.end_of_text)
    budget = min(tokenization.SAMPLE_BYTES, stored_bytes)

    def sampled(num_bytes: int) -> None:
        progress(PrepareProgress("tokenizer", min(num_bytes, budget), budget))

    return tokenization.train(
        files,
        options.text_field,
        options.vocab_size,
        options.max_bytes,
        sampled,
        fmt=options.format,
        end_of_text=str(options.end_of_text or tokenization.END_OF_TEXT),
    )


def _without_output(found: FoundFiles, out: str) -> list[SourceFile]:
    """The files found, without those of a data set at `out`: the sources may be a directory that contains `out`."""
    filesystem, path = open_filesystem(out)
    root = (os.path.realpath(path) if is_local(filesystem) else path).rstrip("/") + "/"

    def is_ours(file: SourceFile) -> bool:
        if str(file.filesystem.protocol) != str(filesystem.protocol):
            return False
        return f"{os.path.realpath(file.path) if is_local(filesystem) else file.path}".startswith(root)

    kept = [file for file in found.files if not is_ours(file)]
    found.left_out += Counter({"files of the data set itself": len(found.files) - len(kept)})
    if not kept:
        raise ConfigError(f"the sources name only files of the data set {out} itself; name files that hold text")
    return kept


def is_validation(index: int, fraction: float) -> bool:
    """Whether document number `index` is held out. A pure function of `index` and `fraction`.

    Of every 1/fraction consecutive documents one is held out, at a scrambled place. So the number of held-out documents
    is exact to within one document also for a small corpus. Independent draws would leave data shards without any.
    """
    if fraction <= 0:
        return False
    share = Fraction(fraction).limit_denominator(1_000_000) or Fraction(1, 1_000_000)
    block = math.floor(index * share)
    begin, end = math.ceil(block / share), math.ceil((block + 1) / share)
    digest = blake2b(str(block).encode(), digest_size=8).digest()
    return index == begin + int.from_bytes(digest, "little") % (end - begin)


def _contents(
    options: PrepareConfig, corpus: Corpus, division: Division, tokenizer: tokenization.TokenizerFile
) -> dict[str, Any]:
    """The manifest's entries on the tokenizer, the files that were read, and the division."""
    return {
        "token_dtype": tokenizer.token_dtype,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text_id": tokenizer.end_of_text_id,
        "end_of_text": tokenizer.end_of_text,
        "sources": tuple(without_password(source) for source in options.sources),
        "read_as": dict(sorted(corpus.tally.read_as.items())),
        "num_split_documents": corpus.num_split,
        "piece_bytes": division.piece_bytes if corpus.num_split else 0,
    }


def _tokenizing(state: PrepareProgress, corpus: Corpus, writers: dict[Split, SplitWriter]) -> PrepareProgress:
    return replace(
        state,
        phase="tokenize",
        bytes_done=min(corpus.stored_bytes_done, corpus.stored_bytes),
        bytes_total=corpus.stored_bytes,
        num_documents=sum(writer.num_documents for writer in writers.values()),
        num_tokens=sum(writer.num_tokens for writer in writers.values()),
        num_skipped_files=corpus.num_skipped_files,
    )


def _notes(
    options: PrepareConfig,
    found: FoundFiles,
    corpus: Corpus,
    division: Division,
    tokenizer: tokenization.TokenizerFile,
    num_unknown: int,
) -> tuple[str, ...]:
    notes = [f"{what} ({count})" for what, count in sorted(corpus.tally.notes.items())]
    if corpus.first_not_text:
        notes.append(f"{NOT_TEXT} were left out ({corpus.num_skipped_files}), the first: {corpus.first_not_text}")
    if found.num_repeated:
        notes.append(f"files are also read through a link; their text is in the data set twice ({found.num_repeated})")
    if division.validation_fraction == 0 and options.validation_fraction != 0:
        notes.append("nothing was held out, since there is a single short text; add text, or train without validation")
    if corpus.num_split:
        notes.append(
            f"{SPLIT} at paragraphs, lines or sentences ({corpus.num_split}); each piece of about "
            f"{-(-corpus.piece_bytes >> 10)} KiB is a document of the data set"
        )
    if num_unknown:
        notes.append(f"parts of texts are not in the tokenizer's vocabulary; each is an unknown token ({num_unknown})")
    if tokenization.drops_characters(tokenizer.content):
        notes.append("the tokenizer drops characters that its vocabulary lacks: such characters of the texts are lost")
    return tuple(notes)


def _check_counts(left_out: Mapping[str, int], writers: Mapping[Split, SplitWriter]) -> None:
    if not any(writer.num_documents for writer in writers.values()):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()))
        raise DataError(f"the sources hold no text{f' ({reasons})' if reasons else ''}; name files that do")


def _num_processes(wanted: int | None, num_bytes: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted is None:
        return cores if num_bytes > SERIAL_BYTES else 1
    return max(1, min(wanted, cores))
