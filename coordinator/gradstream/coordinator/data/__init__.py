"""Prepare data sets: sources, tokenizer, data shards, inspection. `prepare` runs all phases."""
