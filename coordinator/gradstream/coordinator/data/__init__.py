"""The pieces of data preparation: sources, tokenizer, data shards, inspection. `data_prepare` puts them together."""
