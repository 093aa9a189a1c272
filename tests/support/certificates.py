"""Certificates like those of gradstream's authority, valid or wrong in every possible way."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gradstream.core.credentials.tls_diagnosis import Identity


def _name(name: str, cluster: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster)]
    )


@dataclass
class Authority:
    """A CA. `not_before` and `not_after` of its certificates are in days from now."""

    cluster: str = "c0ffee00"

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder("gradstream CA", self._key, -1.0, 3650.0)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.ca = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(self, role: str, name: str, not_before: float = -1.0, not_after: float = 365.0) -> Identity:
        """Issue credentials for one holder."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(name, key, not_before, not_after).add_extension(
            x509.SubjectAlternativeName([x509.DNSName(f"{role}.gradstream")]), critical=False
        )
        return Identity(
            ca=self.ca,
            cert=builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
            key=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    def _builder(
        self, name: str, key: ec.EllipticCurvePrivateKey, not_before: float, not_after: float
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name, self.cluster))
            .issuer_name(_name("gradstream CA", self.cluster))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=not_before))
            .not_valid_after(now + timedelta(days=not_after))
        )
