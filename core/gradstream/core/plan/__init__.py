"""The plan that every process of a job agrees on for one epoch; fragments and bundles."""
