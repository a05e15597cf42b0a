"""A token service for docker-registry, as the registry's token specification describes it.

It signs JSON Web Tokens with an RSA key whose certificate the registry trusts, gives anybody a
token for what anybody may do, which is nothing, and the robot a token for what it asks. Runs in a
thread of the test process, so that a test can count what it was asked.
"""

import base64
import json
import threading
import time
import uuid
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

import trustme
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate

SERVICE = "registry.example.com"
ISSUER = "the suite's token service"
LIFETIME = 300


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _compact(value: object) -> str:
    return _base64url(json.dumps(value, separators=(",", ":")).encode())


class Signer:
    """Signs tokens by RS256; the certificate travels in the token (RFC 7515 §4.1.6, x5c)."""

    def __init__(self, authority: trustme.CA) -> None:
        issued = authority.issue_cert("token.example.com", key_type=trustme.KeyType.RSA)
        key = load_pem_private_key(issued.private_key_pem.bytes(), password=None)
        if not isinstance(key, RSAPrivateKey):
            raise TypeError(f"asked for an RSA key, got {type(key).__name__}")
        self._key = key
        leaf = load_pem_x509_certificate(issued.cert_chain_pems[0].bytes())
        self._chain = [base64.b64encode(leaf.public_bytes(Encoding.DER)).decode()]

    def token(self, account: str, access: Sequence[dict[str, object]]) -> str:
        """A token that lets the account do what `access` says, for LIFETIME seconds from now."""
        now = int(time.time())
        header = {"typ": "JWT", "alg": "RS256", "x5c": self._chain}
        claims = {
            "iss": ISSUER,
            "sub": account,
            "aud": SERVICE,
            "iat": now,
            # The registry compares whole seconds and allows no token from the future.
            "nbf": now - 5,
            "exp": now + LIFETIME,
            "jti": uuid.uuid4().hex,
            "access": access,
        }
        signed = f"{_compact(header)}.{_compact(claims)}"
        signature = self._key.sign(signed.encode(), PKCS1v15(), hashes.SHA256())
        return f"{signed}.{_base64url(signature)}"


def _access(scopes: Sequence[str]) -> list[dict[str, object]]:
    """The `access` claim for scopes such as `repository:team/app:pull`."""
    granted: list[dict[str, object]] = []
    for scope in " ".join(scopes).split():
        kind, _, rest = scope.partition(":")
        name, _, actions = rest.rpartition(":")
        granted.append({"type": kind, "name": name, "actions": actions.split(",")})
    return granted


class TokenService:
    """Answers `GET /token?service=…&scope=…`; `asked` keeps (account, scopes) of every request."""

    def __init__(self, authority: trustme.CA, account: tuple[str, str]) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self._signer = Signer(authority)
        self._account = account
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="token service")
        self.port = self._server.server_port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reply(self, query: str, authorization: str | None) -> tuple[int, dict[str, object]]:
        """Status and body for a request; 401 for credentials that are wrong."""
        scopes = tuple(parse_qs(query).get("scope", ()))
        if authorization is None:
            self.asked.append(("", scopes))
            return 200, {"token": self._signer.token("", []), "expires_in": LIFETIME}
        basic = base64.b64encode(":".join(self._account).encode()).decode()
        if authorization != f"Basic {basic}":
            return 401, {"errors": [{"code": "UNAUTHORIZED", "message": "wrong credentials"}]}
        self.asked.append((self._account[0], scopes))
        token = self._signer.token(self._account[0], _access(scopes))
        return 200, {"token": token, "expires_in": LIFETIME}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = urlsplit(self.path).query
                status, body = service.reply(query, self.headers.get("Authorization"))
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass  # nginx, in front, keeps the log

        return Handler
