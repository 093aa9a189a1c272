"""The coordinator: membership, leases, jobs, durable state, data preparation and the command line."""
