"""Certificates that sign themselves, for tests of TLS."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

DAY = datetime.timedelta(days=1)


def make(
    folder: Path,
    name: str,
    begin: datetime.timedelta = -DAY,
    end: datetime.timedelta = DAY,
    password: bytes | None = None,
) -> tuple[str, str]:
    """Write a certificate for `name`, valid from `begin` to `end` as seen from now, and its key. Returns both paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    named = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder().subject_name(named).issuer_name(named).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now + begin).not_valid_after(now + end)
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    coding = serialization.BestAvailableEncryption(password) if password is not None else serialization.NoEncryption()
    certificate_path, key_path = folder / "certificate.pem", folder / "key.pem"
    signed = made.sign(key, hashes.SHA256())
    certificate_path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, coding))
    return str(certificate_path), str(key_path)
