"""`gradstream events` and `gradstream logs`: times, and an older coordinator."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from gradstream.client._watch_types import check_selected
from gradstream.coordinator.cli.history import parse_since
from gradstream.core.errors import ConfigError
from gradstream.proto.v1 import jobs_pb2


def test_since_is_a_duration_or_a_time() -> None:
    for text, ago in (("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400)):
        begin = parse_since(text)
        assert begin is not None
        assert abs(datetime.now(UTC) - timedelta(seconds=ago) - begin) < timedelta(seconds=30)
    assert parse_since("2026-01-31T12:00+00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert parse_since("2026-01-31") == datetime(2026, 1, 31).astimezone()
    assert parse_since(None) is None
    for text in ("yesterday", "10", "-5m", "9999999999d", ""):
        with pytest.raises(ConfigError, match="is no time; give 90s"):
            parse_since(text)


def test_an_older_coordinator_that_cannot_select_is_named() -> None:
    item = jobs_pb2.WatchJobResponse(event=jobs_pb2.Event())
    check_selected(jobs_pb2.WatchJobRequest(kinds=["event"], paged=True), item)
    asked = jobs_pb2.WatchJobRequest(nodes=["worker-0"], tail=3, paged=True)
    check_selected(asked, jobs_pb2.WatchJobResponse(items=[item]))
    with pytest.raises(ConfigError, match="cannot select by nodes, tail; update it"):
        check_selected(asked, item)
