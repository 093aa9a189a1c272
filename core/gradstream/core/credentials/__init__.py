"""Certificates and tokens: the authority, the credentials that it issues, and the diagnosis of refused connections."""
