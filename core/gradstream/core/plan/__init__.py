"""The plan of one epoch, with its fragments, bundles, leases and sizes on the wire."""
