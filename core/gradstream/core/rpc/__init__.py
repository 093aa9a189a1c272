"""gRPC as gradstream uses it: channels and servers, errors, who may call, and how much."""
