"""The certificates of a cluster: made, read, verified and used to sign.

Importing `cryptography` takes 0.1 s. Only this module imports it at the top; other modules import this one inside their
functions.

A certificate has an ECDSA key on P-256. The common name is the holder's name, the organization the cluster's id, and
the only DNS name is `<role>.gradstream`, by which callers know the peer's role. Certificates and keys are PEM here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gradstream.core.credentials.tokens import DNS_SUFFIX, PEOPLE_ROLES, ROLES, is_cluster_id, is_name, renewal, utc
from gradstream.core.errors import ConfigError

SKEW_SECONDS = 3600
"""Time before its making from which a certificate is valid, for machines whose clocks are behind."""
MAX_CERTIFICATES = 8
"""Maximum number of certificates in one file. During a rotation there are two, the old CA and the new one."""


@dataclass(frozen=True)
class Certificate:
    """A certificate's holder, cluster and validity. Times are Unix seconds."""

    role: str
    name: str
    cluster: str
    valid_from: int
    expires_at: int

    @property
    def lifetime_seconds(self) -> int:
        """Time from the certificate's making until it expires."""
        return self.expires_at - self.valid_from - SKEW_SECONDS


@dataclass(frozen=True)
class SigningCa:
    """A CA certificate and its key, which sign certificates."""

    certificate: bytes
    key: bytes


def new_ca(cluster: str, now: float, lifetime_seconds: float) -> SigningCa:
    """Make a new CA of a cluster."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # Each CA has its own name: where two CAs are trusted, they cannot be confused.
    name = _name(f"gradstream CA {identifier.digest.hex()[:8]}", cluster)
    # Path length 1: during a rotation this CA signs the next one.
    made = _ca_certificate(name, name, key.public_key(), key, 1, now, now + lifetime_seconds)
    return SigningCa(_pem(made), _key_pem(key))


def cross_sign(ca: bytes, by: SigningCa, now: float) -> bytes:
    """The certificate of the new CA `ca`, signed by the old CA `by`, for peers that trust only the old CA."""
    subject, issuer = _certificates(ca)[0], _certificates(by.certificate)[0]
    expires_at = min(subject.not_valid_after_utc, issuer.not_valid_after_utc).timestamp()
    key = _load_key(by.key)
    return _pem(_ca_certificate(subject.subject, issuer.subject, _public(subject), key, 0, now, expires_at))


def new_leaf(ca: SigningCa, cluster: str, role: str, name: str, now: float, expires_at: float) -> tuple[bytes, bytes]:
    """Make a certificate for a holder's name and role, as (certificate, key)."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = _certificates(ca.certificate)[0]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role not in PEOPLE_ROLES:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    builder = (
        _builder(_name(name, cluster), issuer.subject, key.public_key(), now, expires_at)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(role + DNS_SUFFIX)]), critical=False)
        .add_extension(_authority_identifier(_public(issuer)), critical=False)
    )
    return _pem(builder.sign(_load_key(ca.key), hashes.SHA256())), _key_pem(key)


def describe(cert: bytes, where: str) -> Certificate:
    """Read the holder of the first certificate in `cert`. `where` says in messages which file it is.

    Raises ConfigError when the certificate was not made by gradstream.
    """
    try:
        leaf = _certificates(cert)[0]
        names = [attribute.value for attribute in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        clusters = [attribute.value for attribute in leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
        hosts = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        roles = [host.removesuffix(DNS_SUFFIX) for host in hosts.get_values_for_type(x509.DNSName)]
        valid_from, expires_at = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    except x509.ExtensionNotFound:
        names, clusters, roles = [], [], []
    except Exception:  # the parser raises errors of many types for malformed bytes
        raise ConfigError(f"cert.pem {where} is not a certificate in PEM form; copy the credentials again") from None
    if len(names) != 1 or len(clusters) != 1 or len(roles) != 1 or roles[0] not in ROLES:
        raise ConfigError(f"cert.pem {where} was not made by `gradstream certs`; only that command issues credentials")
    name, cluster = str(names[0]), str(clusters[0])
    if not is_name(name) or not is_cluster_id(cluster):
        raise ConfigError(f"cert.pem {where} was not made by `gradstream certs`; only that command issues credentials")
    return Certificate(roles[0], name, cluster, int(valid_from.timestamp()), int(expires_at.timestamp()))


def sha256(cert: bytes) -> str:
    """Hex sha256 of the first certificate in a PEM text, over its DER form, as the token table records it."""
    return _certificates(cert)[0].fingerprint(hashes.SHA256()).hex()


def sign(ca: SigningCa, data: bytes) -> bytes:
    """The CA's signature of `data` (ECDSA with SHA-256, DER)."""
    return _load_key(ca.key).sign(data, ec.ECDSA(hashes.SHA256()))


def verify_signature(trusted: bytes, signer: bytes, data: bytes, signature: bytes) -> None:
    """Check the signature of `data` by the CA `signer` (PEM). Raises ConfigError.

    The signer must be one of the CAs in `trusted` (PEM), or a CA that one of these has signed.
    """
    try:
        authorities, found = _certificates(trusted), _certificates(signer)[0]
        is_ca = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        is_known = any(found == authority or _is_signed(found, authority) for authority in authorities)
        _public(found).verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except Exception:  # the parser raises errors of many types for malformed bytes
        is_ca = is_known = False
    if not (is_ca and is_known):
        raise ConfigError("the signature of the token table is not of this cluster's authority")


def check(ca: bytes, cert: bytes, key: bytes, now: float, where: str, directory: str) -> None:
    """Check that a key belongs to a certificate, that one of the CAs signed the certificate, and that both are valid.

    Raises ConfigError. The cure in the message names `directory` ("DIR" where it is not known).
    """
    leaf = describe(cert, where)
    try:
        authorities = _certificates(ca)
    except Exception:
        raise ConfigError(f"ca.pem {where} is not a certificate in PEM form; copy the credentials again") from None
    try:
        private = _load_key(key)
    except Exception:
        raise ConfigError(f"key.pem {where} is not a private key in PEM form; copy the credentials again") from None
    certificate = _certificates(cert)[0]
    if private.public_key() != certificate.public_key():
        raise ConfigError(f"key.pem {where} is not the key of cert.pem; copy both again from where they were issued")
    signer = next((authority for authority in authorities if _is_signed(certificate, authority)), None)
    if signer is None:
        raise ConfigError(
            f"cert.pem {where} is not signed by the CA in ca.pem; copy all files of one credential, or issue it again"
        )
    clock = f"this machine's clock says {utc(now)}"
    whose = f"the certificate of {leaf.role} '{leaf.name}' {where}"
    if now >= leaf.expires_at:
        cure = renewal(leaf.role, leaf.name, directory)
        raise ConfigError(f"{whose} expired on {utc(leaf.expires_at)} ({clock}); {cure}")
    if now < leaf.valid_from:
        raise ConfigError(f"{whose} is valid from {utc(leaf.valid_from)} on and {clock}; set the clock right")
    if now >= signer.not_valid_after_utc.timestamp():
        expired = utc(signer.not_valid_after_utc.timestamp())
        raise ConfigError(
            f"the CA certificate {where} expired on {expired} ({clock}); renew it: `gradstream certs rotate --ca`"
        )


def ca_of_key(cas: bytes, key: bytes) -> tuple[bytes, tuple[bytes, ...]] | None:
    """Find the CA certificate of a key in a ca.pem, as (that certificate, the others); None when none has the key.

    Raises ConfigError when `cas` or `key` is not PEM.
    """
    try:
        found, public = _certificates(cas), _load_key(key).public_key()
    except Exception:
        raise ConfigError("no PEM") from None
    own = [_pem(certificate) for certificate in found if certificate.public_key() == public]
    return (own[0], tuple(_pem(other) for other in found if other.public_key() != public)) if own else None


def cluster_of_ca(ca: bytes) -> tuple[str, int]:
    """Read a CA certificate, as (cluster id, Unix second of its end). Raises ConfigError when it has no cluster id."""
    try:
        certificate = _certificates(ca)[0]
    except Exception:
        raise ConfigError("ca.pem is not a certificate in PEM form; restore it or choose another directory") from None
    clusters = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    cluster = str(clusters[0].value) if clusters else ""
    if not is_cluster_id(cluster):
        raise ConfigError("the CA certificate was not made by `gradstream certs init`")
    return cluster, int(certificate.not_valid_after_utc.timestamp())


def _certificates(pem: bytes) -> list[x509.Certificate]:
    found = x509.load_pem_x509_certificates(pem)
    if not 0 < len(found) <= MAX_CERTIFICATES:
        raise ValueError("too many certificates")
    for certificate in found:
        _public(certificate)
    return found


def _public(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    public = certificate.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ValueError("not an ECDSA key")
    return public


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an ECDSA key")
    return key


def _is_signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _name(common_name: str, cluster: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster), x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    )


def _ca_certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    key: ec.EllipticCurvePrivateKey,
    path_length: int,
    now: float,
    expires_at: float,
) -> x509.Certificate:
    builder = (
        _builder(subject, issuer, public, now, expires_at)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(_authority_identifier(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: float, expires_at: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(int(now) - SKEW_SECONDS, UTC))
        .not_valid_after(datetime.fromtimestamp(int(expires_at), UTC))
    )


def _usage(digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_identifier(public: ec.EllipticCurvePublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(public)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
