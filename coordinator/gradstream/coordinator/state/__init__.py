"""The coordinator's durable state, and notification of the watchers of a job."""
