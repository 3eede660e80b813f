"""TLS from a certificate and a key in files: checked before anything is deployed, and trusted by our own commands."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

from cluster.errors import UserError

BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def context(certificate: str, key: str) -> ssl.SSLContext:
    """Return what a server needs: TLS 1.2 and later. Raises UserError for files that are no matching pair."""
    for name, path in (("certificate", certificate), ("key", key)):
        if not Path(path).is_file():
            raise UserError(f"http.tls.{name}: there is no file {path} on the node where a gateway runs")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])
    try:
        made.load_cert_chain(certificate, key, password=_no_password)
    except PermissionError as error:
        raise UserError(f"http.tls: {certificate} or {key} may not be read by this user") from error
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        known = {"KEY_VALUES_MISMATCH": "the key is not that of the certificate"}
        raise UserError(f"http.tls: {certificate} and {key}: {known.get(reason, reason)}") from error
    return made


def trusting(certificate: str) -> ssl.SSLContext:
    """Return what a client needs to trust the server of this very certificate, under whatever name it is reached.

    The first certificate of the file alone: those behind it sign for others too.
    """
    text = Path(certificate).read_text(encoding="ascii", errors="replace")
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise UserError(f"http.tls.certificate: {certificate} has no certificate in PEM form")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        made.load_verify_locations(cadata=text[begin : end + len(END)] + "\n")
    except ssl.SSLError as error:
        raise UserError(f"http.tls.certificate: {certificate}: {error.reason or error}") from error
    return made


def check(certificate: str, key: str) -> str:
    """Shake hands with ourselves in memory, and return a digest of the certificate.

    Raises:
        UserError: clients could not accept it.
    """
    server, client = context(certificate, key), trusting(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server),
    ]
    try:
        while ends:
            ends = [end for end in ends if not _is_done(end)]
    except ssl.SSLCertVerificationError as error:
        raise UserError(f"http.tls.certificate: {certificate}: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise UserError(f"http.tls: {certificate} and {key}: {error.reason or error}") from error
    return hashlib.sha256(Path(certificate).read_bytes()).hexdigest()[:16]


def _is_done(end: ssl.SSLObject) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not, readable by its owner alone")
