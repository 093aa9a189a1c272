"""The coordinator's gRPC services. Each call is decoded, checked, carried out and encoded."""
