"""The contents of certificates, for people and for diagnoses. Nothing here decides if a certificate is trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradstream.core.credentials.tokens import DNS_SUFFIX


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """A certificate's contents. Times are Unix seconds; a name that the certificate lacks is empty."""

    name: str
    cluster: str
    role: str
    issuer: str
    issuer_cluster: str
    not_before: float
    not_after: float

    @property
    def title(self) -> str:
        """The holder and cluster, like: worker 'w-1' of cluster 1a2b3c4d."""
        whose = f"{self.role} '{self.name}'" if self.role else f"'{self.name or 'nobody'}'"
        return f"{whose} of cluster {self.cluster}" if self.cluster else whose


def read_certificates(pem: bytes) -> list[CertificateFacts]:
    """Read the certificates in a PEM file. Raises ValueError when there is none or one is malformed."""
    from cryptography import x509

    return [_facts(certificate) for certificate in x509.load_pem_x509_certificates(pem)]


def read_der(der: bytes) -> CertificateFacts:
    """Read a certificate in DER form, as peers show it. Raises ValueError when it is malformed."""
    from cryptography import x509

    return _facts(x509.load_der_x509_certificate(der))


def _facts(certificate: Any) -> CertificateFacts:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    def first(name: Any, oid: Any) -> str:
        found = name.get_attributes_for_oid(oid)
        return str(found[0].value) if found else ""

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = names.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        hosts = []
    return CertificateFacts(
        name=first(certificate.subject, NameOID.COMMON_NAME),
        cluster=first(certificate.subject, NameOID.ORGANIZATION_NAME),
        role=next((host.removesuffix(DNS_SUFFIX) for host in hosts if host.endswith(DNS_SUFFIX)), ""),
        issuer=first(certificate.issuer, NameOID.COMMON_NAME),
        issuer_cluster=first(certificate.issuer, NameOID.ORGANIZATION_NAME),
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
    )
