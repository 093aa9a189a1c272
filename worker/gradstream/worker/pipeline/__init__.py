"""A worker's neighbours in a pipeline."""
