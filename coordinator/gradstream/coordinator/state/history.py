"""What a reader asks of a job's history, and the facts of an item by which it is selected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gradstream.proto.v1 import jobs_pb2

HISTORY_KINDS = tuple(field.name for field in jobs_pb2.WatchJobResponse.DESCRIPTOR.oneofs_by_name["item"].fields)
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
"""The levels of log lines, the lowest first. A line of any other level ranks above all of them."""
NAMED_KINDS = ("event", "log")
"""The kinds of items that name nodes."""


@dataclass(frozen=True, slots=True)
class HistoryFilter:
    """Selects items of a history. An empty field selects all items."""

    # Kinds of items, of HISTORY_KINDS.
    kinds: tuple[str, ...] = ()
    # Of the events, those of these kinds. Other items are not affected.
    event_kinds: tuple[str, ...] = ()
    # Log lines of these nodes, and events whose message names one of them. Items of other kinds name no node.
    nodes: tuple[str, ...] = ()
    # Of the log lines, those of this level and above. Other items are not affected.
    level: str = ""
    # Items of this Unix time (ms) and later.
    since_unix_ms: int = 0

    @property
    def selects_all(self) -> bool:
        """Whether every item is selected."""
        return self == ALL

    @property
    def wanted_kinds(self) -> tuple[str, ...]:
        """The kinds of items that can be selected."""
        kinds = self.kinds or HISTORY_KINDS
        return tuple(kind for kind in dict.fromkeys(kinds) if not self.nodes or kind in NAMED_KINDS)

    def selects(self, item: jobs_pb2.WatchJobResponse) -> bool:
        """Whether an item is selected."""
        facts = facts_of(item)
        if facts.kind not in self.wanted_kinds or facts.unix_ms < self.since_unix_ms:
            return False
        if facts.kind == "event":
            is_wanted = not self.event_kinds or facts.source in self.event_kinds
            return is_wanted and (not self.nodes or names_one(item.event.message, self.nodes))
        if facts.kind == "log":
            return facts.rank >= rank_of(self.level) and (not self.nodes or facts.source in self.nodes)
        return True


ALL = HistoryFilter()


@dataclass(frozen=True, slots=True)
class ItemFacts:
    """The facts of an item that are stored beside the item."""

    kind: str
    # 0 if the item has no time of its own.
    unix_ms: int = 0
    # The kind of an event, the node of a log line; "" for other items.
    source: str = ""
    # The rank of a log line's level.
    rank: int = 0


def facts_of(item: jobs_pb2.WatchJobResponse) -> ItemFacts:
    """The facts of an item."""
    kind = item.WhichOneof("item") or ""
    if kind == "event":
        return ItemFacts(kind, item.event.unix_ms, item.event.kind)
    if kind == "log":
        return ItemFacts(kind, item.log.line.unix_ms, item.log.node, rank_of(item.log.line.level))
    if kind == "step":
        return ItemFacts(kind, item.step.unix_ms)
    if kind == "checkpoint":
        return ItemFacts(kind, item.checkpoint.unix_ms)
    return ItemFacts(kind)


def rank_of(level: str) -> int:
    """The rank of a log level; the lowest for no level, the highest for an unknown one."""
    if not level:
        return 0
    return LOG_LEVELS.index(level) if level in LOG_LEVELS else len(LOG_LEVELS)


def names_one(message: str, nodes: Sequence[str]) -> bool:
    """Whether a message names one of these nodes: "worker-1" is not named in "worker-10 is here"."""
    return any(_pattern(node).search(message) for node in nodes)


@lru_cache(maxsize=64)
def _pattern(node: str) -> re.Pattern[str]:
    # A node's name consists of letters, digits, '.', '_' and '-'. A full stop may follow it at the end of a sentence.
    return re.compile(rf"(?<![\w.-]){re.escape(node)}(?![\w-]|\.\w)")
