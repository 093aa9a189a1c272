"""Certificates and tokens: the authority, what it issues, and what is wrong when a connection is refused."""
