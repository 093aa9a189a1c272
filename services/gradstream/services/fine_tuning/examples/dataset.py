"""Makes a data set of packed rows from the rows of a task's files, or a preview of it.

Phases: read and render every row, apply the policies, split, pack, write. The data set is a function of the rows, the
config and the seed, not of the order of the rows. All examples are in memory at once: their text, and 5 bytes a token.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format

from gradstream.core.data.manifest import MANIFEST_NAME, Manifest, parse_manifest
from gradstream.core.data.output import Output, Split
from gradstream.core.data.sources import WITHOUT_ROWS, SourceFile, find_files, without_password
from gradstream.core.errors import ConfigError, DataError, one_line, plain_line
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig
from gradstream.core.storage import files
from gradstream.proto.v1 import fine_tuning_pb2
from gradstream.services.fine_tuning.examples.chat import chat_prompt_ids, chat_template, render_chat
from gradstream.services.fine_tuning.examples.encoding import Encoder
from gradstream.services.fine_tuning.examples.reading import BadRowError, UnknownFieldsError, read_rows, resolve_format
from gradstream.services.fine_tuning.examples.rendering import Example, Prompt, Renderer
from gradstream.services.fine_tuning.examples.rows import pack, write_rows

__all__ = ["Prepared", "Prompt", "chat_prompt_ids", "load_prepared", "prepare_examples", "preview", "render_chat"]

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
REPORT_FILE = "examples.json"
PROMPTS_FILE = "prompts.jsonl"
SHOWN_BAD_ROWS = 20
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A data set of examples.

    `prompts` are the prompts of the held-out examples, each once, ordered by their hashes; empty for text.
    """

    manifest: Manifest
    report: fine_tuning_pb2.ExamplesReport
    prompts: tuple[Prompt, ...]


def prepare_examples(
    config: ExamplesConfig, tokenizer: Any, row_length: int, num_shards: int, directory: str, seed: int
) -> Prepared:
    """Make the data set that `config` describes in `directory` (any fsspec path), which appears complete or not at all.

    `row_length`: tokens a row. `num_shards`: data shards of each split; each gets at least one row. The directory also
    holds the report and the prompts, for `load_prepared`.

    Raises ConfigError (paths, format, tokenizer, `directory`) and DataError (contents), each with one line.
    """
    collected = _collect(config, tokenizer, row_length)
    collected.enforce(config)
    splits = _split(config, collected, num_shards)
    for split in SPLITS:
        if len(splits[split]) < num_shards:
            raise DataError(_too_few(config, collected, splits, num_shards))
    rows = {split: _rows(config, splits[split], row_length, num_shards) for split in SPLITS}
    report = _report(collected, splits, len(rows["train"]))
    prompts = _prompts(splits["validation"])
    encoder = collected.encoder
    with Output(directory) as output:
        tokenizer_sha256 = _write(output, TOKENIZER_FILE, encoder.content)
        if template := _template(tokenizer):
            _write(output, TEMPLATE_FILE, template.encode("utf-8"))
        _write(output, REPORT_FILE, json.dumps(json_format.MessageToDict(report), indent=1).encode("utf-8"))
        _write(output, PROMPTS_FILE, b"".join(json.dumps(prompt).encode() + b"\n" for prompt in prompts))
        shards = [
            shard
            for split in SPLITS
            for shard in write_rows(output, split, rows[split], row_length, encoder.end_of_text_id, num_shards, seed)
        ]
        manifest = Manifest(
            token_dtype="uint32",
            vocab_size=encoder.vocab_size,
            end_of_text_id=encoder.end_of_text_id,
            end_of_text=str(tokenizer.eos_token),
            tokenizer_file=TOKENIZER_FILE,
            tokenizer_sha256=tokenizer_sha256,
            shards=tuple(shards),
            sources=tuple(without_password(path) for path in (config.path, config.validation_path) if path),
            layout="rows",
            row_length=row_length,
        )
        output.publish(manifest)
    return Prepared(manifest, report, prompts)


def load_prepared(directory: str) -> Prepared:
    """Load the data set that `prepare_examples` made in `directory`. Raises DataError if it is missing or damaged."""
    manifest = parse_manifest(_read(directory, MANIFEST_NAME), files.join(directory, MANIFEST_NAME))
    report = fine_tuning_pb2.ExamplesReport()
    try:
        json_format.Parse(_read(directory, REPORT_FILE), report)
        lines = [json.loads(line) for line in _read(directory, PROMPTS_FILE).splitlines()]
        prompts = tuple(Prompt(tuple(map(int, ids)), str(text), str(expected)) for ids, text, expected in lines)
    except (ValueError, TypeError, ArithmeticError, RecursionError, json_format.ParseError) as error:
        raise DataError(f"the examples in {directory} are corrupt ({one_line(error)}); prepare them again") from None
    return Prepared(manifest, report, prompts)


def preview(
    config: ExamplesConfig, tokenizer: Any, row_length: int, num_examples: int, num_shards: int = 1
) -> fine_tuning_pb2.PreviewExamplesResponse:
    """Render the first examples as for training, and report on all rows. Writes nothing.

    Bad rows and examples that are too long are reported under every policy. Raises ConfigError and DataError where
    there is nothing to show.
    """
    collected = _collect(config, tokenizer, row_length)
    splits = _split(config, collected, num_shards)
    rows = _rows(config, splits["train"], row_length, num_shards)
    response = fine_tuning_pb2.PreviewExamplesResponse(report=_report(collected, splits, len(rows)))
    for example in (collected.examples["train"] + collected.examples["validation"])[:num_examples]:
        response.examples.append(
            fine_tuning_pb2.RenderedExample(
                origin=example.origin,
                pieces=[
                    fine_tuning_pb2.RenderedPiece(text=text, is_target=is_target)
                    for text, is_target in collected.encoder.groups(example.ids.tolist(), example.is_target.tolist())
                ],
                num_tokens=len(example.ids),
                num_targets=example.num_targets,
            )
        )
    return response


@dataclass(slots=True)
class _Collected:
    """The result of rendering all rows. `examples` are the usable ones by split, in the order of their files."""

    encoder: Encoder
    format: str = ""
    unused_fields: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[Split, list[Example]] = field(default_factory=lambda: {"train": [], "validation": []})
    num_rows: int = 0
    bad_rows: list[str] = field(default_factory=list)
    num_bad: int = 0
    too_long: str = ""
    num_too_long: int = 0
    longest: int = 0
    num_truncated: int = 0
    sha256: list[str] = field(default_factory=list)

    def enforce(self, config: ExamplesConfig) -> None:
        """Apply the policy `fail`. Raises DataError with the first row that violates it."""
        if self.num_bad and config.bad_rows == "fail":
            raise DataError(
                f"{self.bad_rows[0]}{_more(self.num_bad, 'bad row')}; correct the data, or leave bad rows out with "
                f"data.bad_rows skip"
            )
        if self.num_too_long and config.too_long == "fail":
            longest = f", the longest takes {self.longest}" if self.num_too_long > 1 else ""
            raise DataError(
                f"{self.too_long}{_more(self.num_too_long, 'example')}{longest}; raise training.sequence_length, or "
                f"set data.too_long to skip or truncate"
            )
        if not any(self.examples.values()):
            first = f"; the first: {self.bad_rows[0]}" if self.bad_rows else ""
            raise DataError(
                f"{config.path} has no example that can be used ({self.num_bad} of {self.num_rows} rows are bad, "
                f"{self.num_too_long} examples too long){first}; correct the data"
            )


def _collect(config: ExamplesConfig, tokenizer: Any, row_length: int) -> _Collected:
    """Phase 1: read and render every row. Raises ConfigError and DataError for problems that no policy covers."""
    collected = _Collected(Encoder(tokenizer))
    renderer: Renderer | None = None
    unknown = ""  # the first row that no format fits
    sources: list[tuple[Split, SourceFile]] = []
    paths: list[tuple[Split, str | None]] = [("train", config.path), ("validation", config.validation_path)]
    for split, path in paths:
        found = find_files([path] if path else [])
        sources += [(split, file) for file in found.files]
        collected.left_out += found.left_out
    for split, file in sources:
        collected.sha256.append(_sha256(file))
        num_before = collected.num_rows
        for row in read_rows(file, config):
            collected.num_rows += 1
            try:
                if row.reason:
                    raise BadRowError(row.reason)
                fmt = resolve_format(config, file, row)
                if renderer is None:
                    config = config.model_copy(update={"format": fmt})
                    renderer = Renderer(config, tokenizer, collected.encoder, fmt, row_length)
                    collected.format = renderer.format
                    collected.unused_fields, collected.notes = renderer.unused_fields, renderer.notes
                for example in renderer.render(row):
                    _add(collected, config, split, example, row_length)
            except BadRowError as error:
                if renderer is None and isinstance(error, UnknownFieldsError):
                    unknown = unknown or f"{row.origin}: {error}"
                collected.num_bad += 1
                if len(collected.bad_rows) < SHOWN_BAD_ROWS:
                    collected.bad_rows.append(plain_line(f"{row.origin}: {error}"))
        collected.left_out += Counter({WITHOUT_ROWS: int(collected.num_rows == num_before)})
    if renderer is None and unknown:
        raise ConfigError(unknown)
    if not collected.num_rows:
        raise DataError(f"{config.path} has no rows; give a file with examples")
    return collected


def _add(collected: _Collected, config: ExamplesConfig, split: Split, example: Example, row_length: int) -> None:
    """Keep an example; if it is too long, truncate it or leave it out, as the policy demands."""
    if example.num_places > row_length:
        shorter = example.truncated(row_length) if config.too_long == "truncate" else None
        if shorter is None:
            collected.num_too_long += 1
            collected.longest = max(collected.longest, example.num_places)
            collected.too_long = collected.too_long or (
                f"{example.origin}: the example takes {example.num_places} tokens of a row, "
                f"training.sequence_length is {row_length}"
            )
            return
        collected.num_truncated += 1
        example = shorter
    collected.examples[split].append(example)


def _split(config: ExamplesConfig, collected: _Collected, num_shards: int) -> dict[Split, list[Example]]:
    """Divide the examples into the two splits, ordered by the hash of their content."""
    train, validation = (sorted(collected.examples[split], key=lambda example: example.key) for split in SPLITS)
    if not config.validation_path:
        held_out = held_out_keys((example.key for example in train), config.validation_fraction, num_shards)
        validation = [example for example in train if example.key in held_out]
        train = [example for example in train if example.key not in held_out]
    return {"train": train, "validation": validation}


def held_out_keys(keys: Iterable[bytes], fraction: float, at_least: int) -> Collection[bytes]:
    """Choose the held-out keys: those in the lowest `fraction` of all possible keys.

    So whether a key is held out depends on that key alone. Exception: where one of the splits would have fewer than
    `at_least` different examples, the boundary moves, if there are enough examples for both.
    """
    ordered = sorted(set(keys))
    line = int(fraction * 2**64)
    num_held_out = sum(int.from_bytes(key[:8], "big") < line for key in ordered)
    if len(ordered) >= 2 * at_least:
        num_held_out = min(max(num_held_out, at_least), len(ordered) - at_least)
    return frozenset(ordered[:num_held_out])


def _rows(config: ExamplesConfig, examples: list[Example], row_length: int, num_shards: int) -> list[list[Example]]:
    if not config.packing:
        return [[example] for example in examples]
    packed = pack([example.num_places for example in examples], row_length, min_rows=num_shards)
    return [[examples[number] for number in row] for row in packed]


def _report(
    collected: _Collected, splits: dict[Split, list[Example]], num_packed_rows: int
) -> fine_tuning_pb2.ExamplesReport:
    every = [example.key for split in SPLITS for example in splits[split]]
    num_alike = len(every) - len(set(every))
    return fine_tuning_pb2.ExamplesReport(
        format=collected.format,
        num_rows=collected.num_rows,
        num_train=len(splits["train"]),
        num_validation=len(splits["validation"]),
        num_bad=collected.num_bad,
        num_too_long=collected.num_too_long,
        num_truncated=collected.num_truncated,
        num_target_tokens=sum(example.num_targets for example in splits["train"]),
        num_packed_rows=num_packed_rows,
        bad_rows=collected.bad_rows,
        sha256=collected.sha256,
        num_tokens=sum(example.num_places for example in splits["train"]),
        unused_fields=collected.unused_fields,
        notes=[
            *([f"{num_alike} examples are the same as another one"] if num_alike else []),
            *(f"{count} {note}" for note, count in collected.notes.items()),
            *(f"{count} {reason} left out" for reason, count in sorted(collected.left_out.items())),
        ],
    )


def _prompts(examples: list[Example]) -> tuple[Prompt, ...]:
    # Examples with the same key are copies of one row.
    by_key = {example.key: example for example in examples}
    return tuple(prompt for example in by_key.values() if (prompt := example.prompt) is not None)


def _too_few(config: ExamplesConfig, collected: _Collected, splits: dict[Split, list[Example]], num_shards: int) -> str:
    left_out = collected.num_bad + collected.num_too_long
    left_out_note = f" ({left_out} of the data were left out)" if left_out else ""
    more = "data.path and data.validation_path" if config.validation_path else "data.path"
    every = [example.key for split in SPLITS for example in splits[split]]
    if len(set(every)) == 1 and not config.validation_path:
        what = f"all {len(every)} examples are alike" if len(every) > 1 else "there is one example"
        return (
            f"{what}{left_out_note}: a slot needs one to train on, and a different one has to be held out; add rows to "
            f"data.path, or name a data.validation_path"
        )
    return (
        f"{len(splits['train'])} examples to train on and {len(splits['validation'])} held out{left_out_note} are too "
        f"few for {num_shards} slots, each of which needs one of both; add rows to {more} or lower training.num_slots"
    )


def _more(count: int, what: str) -> str:
    """The number of further ones of `count`, as text for people."""
    others = count - 1
    return f" (and {others} more {what}{'s' if others > 1 else ''})" if others else ""


def _template(tokenizer: Any) -> str:
    try:
        return chat_template(tokenizer)
    except ConfigError:  # most bases have none
        return ""


def _sha256(file: SourceFile) -> str:
    try:
        with file.open() as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except Exception as error:  # fsspec backends raise errors of their own
        raise DataError(f"{file.name} cannot be read ({one_line(error)}); check the path and the rights") from None


def _write(output: Output, name: str, content: bytes) -> str:
    file = output.create(name)
    with output.explained():
        file.write(content)
        return file.close()


def _read(directory: str, name: str) -> bytes:
    try:
        return files.read_bytes(files.join(directory, name))
    except Exception as error:  # fsspec backends raise errors of their own
        raise DataError(f"{directory}/{name} cannot be read ({one_line(error)}); prepare the examples again") from None
