"""gRPC in gradstream: channels and servers, errors over the wire, access rules and limits."""
