"""Find the job that a call names."""

from __future__ import annotations

from gradstream.coordinator.state.state import JobRecord, State
from gradstream.core.errors import ConfigError, nearest


class JobLookup:
    """Finds jobs by id or name. Each lookup reads one row."""

    def __init__(self, state: State):
        self._state = state

    def find(self, job_id: str) -> JobRecord:
        """Find a job by its id, the newest job for an empty id. Raises ConfigError that suggests the nearest id."""
        record = self._state.get_job(job_id) if job_id else self._state.newest_job()
        if record is not None:
            return record
        known = self._state.job_ids()
        if not known:
            raise ConfigError("there is no job yet; submit one with `gradstream submit RECIPE`")
        raise ConfigError(f"there is no job '{job_id[:100]}'{nearest(job_id, known) or '; `gradstream ls` lists them'}")

    def named(self, name: str) -> JobRecord:
        """Find a job by its id, else the newest with this name (of a fine-tuning); the newest job for an empty name.

        Raises ConfigError that suggests the nearest id.
        """
        if name and self._state.get_job(name) is None:
            found = self._state.newest_job(name)
            if found is not None:
                return found
        return self.find(name)
