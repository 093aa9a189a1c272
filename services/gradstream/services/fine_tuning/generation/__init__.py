"""Generation with bases and results: batching, sampling, streaming."""
