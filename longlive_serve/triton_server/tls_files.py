# SPDX-License-Identifier: Apache-2.0
"""The PEM files for TLS. They are checked before Triton starts, whose errors do not name the file.

Called by `launcher.py` and by the doctor.
"""

from __future__ import annotations

import dataclasses
import ssl
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """None (no TLS), `cert` and `key` (TLS), or all three (mutual TLS). Raises ValueError for other combinations."""

    cert: Path | None = None
    """The server's certificate chain."""
    key: Path | None = None
    client_ca: Path | None = None
    """The authority of the clients' certificates."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None) or (self.client_ca is not None and self.cert is None):
            raise ValueError("tls: got some of cert, key and client_ca, expected cert and key, or all three, or none")

    def options(self) -> list[str]:
        """Triton's options."""
        files = {"server-cert": self.cert, "server-key": self.key, "root-cert": self.client_ca}
        options = [f"--grpc-{name}={file.absolute()}" for name, file in files.items() if file is not None]
        return [*options, "--grpc-use-ssl=true" if self.client_ca is None else "--grpc-use-ssl-mutual=true"]

    def check(self) -> None:
        """Raises ValueError with the file, what is wrong with it and what to do."""
        if self.cert is None or self.key is None:
            return
        for name, file in (("cert", self.cert), ("key", self.key), ("client-ca", self.client_ca)):
            if file is not None:
                _check_readable(f"--tls-{name} {file}", file)
        _check_certificates("--tls-cert", self.cert)
        if self.client_ca is not None:
            _check_certificates("--tls-client-ca", self.client_ca)
        _check_key(self.cert, self.key)


def _check_readable(label: str, file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{label}: no such file, expected a PEM file")
    try:
        with file.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise ValueError(
            f"{label}: cannot be read ({error.strerror}); make it readable for the user that starts the server"
        ) from None


def _check_certificates(option: str, file: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(file)
    except (ssl.SSLError, ValueError):
        raise ValueError(
            f"{option} {file}: got no certificate, expected PEM text: -----BEGIN CERTIFICATE-----"
        ) from None


def _check_key(cert: Path, key: Path) -> None:
    requests: list[bool] = []

    def password() -> str:
        requests.append(True)
        return "x"  # OpenSSL would ask for an empty one at the terminal

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password)
    except (ssl.SSLError, ValueError) as error:
        if requests:
            hint = (
                f"expected one without a password, which Triton cannot ask for: openssl pkey -in {key} -out plain.pem"
            )
            raise ValueError(f"--tls-key {key}: got an encrypted key, {hint}") from None
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise ValueError(f"--tls-key {key}: got the key of another certificate, expected that of {cert}") from None
        raise ValueError(
            f"--tls-key {key}: got no private key, expected PEM text: -----BEGIN PRIVATE KEY----- "
            f"({getattr(error, 'reason', None) or error})"
        ) from None
