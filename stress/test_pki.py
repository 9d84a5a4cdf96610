# SPDX-License-Identifier: Apache-2.0
"""Certificates and a token for a cluster with access control. Used by the stress tests."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
from pathlib import Path
from typing import Any

from longlive_client.grpc_transport import Tls

SCRIPT = Path(__file__).parents[1] / "deploy/certificates.sh"
TOKEN = "a-token-that-somebody-was-given"


@dataclasses.dataclass(frozen=True)
class Keys:
    """Certificates of proxies and servers (deploy/certificates.sh), and a token that the proxy knows, in a new folder.

    With a single authority, the proxy also uses the servers' certificate, and clients use the proxy's.
    """

    folder: Path
    token: str = TOKEN

    def make(self) -> None:
        subprocess.run(["sh", str(SCRIPT), str(self.folder)], check=True, capture_output=True)
        digest = hashlib.sha256(self.token.encode()).hexdigest()
        (self.folder / "tokens").write_text(f"{digest} somebody\n")

    @property
    def client(self) -> Tls:
        """Credentials accepted by the proxy and by the servers."""
        own = self.folder / "proxy"
        return Tls(ca=self.folder / "ca.crt", cert=own / "tls.crt", key=own / "tls.key")

    @property
    def of_server(self) -> dict[str, Any]:
        own = self.folder / "pod"
        return {"tls_cert": own / "tls.crt", "tls_key": own / "tls.key", "tls_client_ca": own / "ca.crt"}

    def of_proxy(self, url: str) -> dict[str, str]:
        """The proxy's environment; clients connect to `url`."""
        return {
            "LONGLIVE_PROXY_TLS": url,
            "LONGLIVE_TLS_CERT": str(self.folder / "pod/tls.crt"),
            "LONGLIVE_TLS_CLIENT_CA": str(self.folder / "ca.crt"),
            "LONGLIVE_PROXY_TOKENS": str(self.folder / "tokens"),
            "LONGLIVE_SERVERS_CA": str(self.folder / "ca.crt"),
            "LONGLIVE_SERVERS_CERT": str(self.folder / "proxy/tls.crt"),
        }
