"""The certificate that https is served with.

In: two files in PEM. Out: an SSL context that can take them anew. Must never know: HTTP.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from amalgam.config.server import ServerSettings
from amalgam.errors import ConfigError


class Certificate:
    """The context that connections are made with; `reload` changes it for those to come.

    Raises:
        ConfigError: a file cannot be read, is no PEM, needs a password, or the key is not the certificate's.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._cert, self._key = settings.tls_cert, settings.tls_key or settings.tls_cert
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self.reload()

    def reload(self) -> None:
        """Read the files again. If they cannot be used, the certificate stays as it is."""
        self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a try, for a failure may leave half of a change
        self._load(self.context)

    def _load(self, context: ssl.SSLContext) -> None:
        for name, path in (("tls_cert", self._cert), ("tls_key", self._key)):
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise ConfigError(f"server.{name} {path!r} cannot be read: {error.strerror}.") from None
        try:
            context.load_cert_chain(self._cert, self._key, password=self._refuse_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                what = f"The key in {self._key!r} is not that of the certificate in {self._cert!r}."
                raise ConfigError(what, remedy="Set server.tls_cert and server.tls_key to a pair.") from None
            raise ConfigError(
                f"server.tls_cert {self._cert!r} and server.tls_key {self._key!r} hold no certificate and key in PEM.",
                remedy="The first begins with BEGIN CERTIFICATE, the second with BEGIN PRIVATE KEY.",
            ) from None

    def _refuse_password(self) -> str:
        raise ConfigError(
            f"The key in {self._key!r} is encrypted.",
            remedy="Decrypt it: openssl pkey -in KEY -out PLAIN; chmod 600 PLAIN.",
        )


def certificate_of(settings: ServerSettings) -> Certificate | None:
    """What the settings ask for; None: plain http.

    Raises:
        ConfigError: see `Certificate`, or there is a key alone.
    """
    if settings.tls_key and not settings.tls_cert:
        raise ConfigError("server.tls_key is set, and server.tls_cert is not.", remedy="Set both.")
    return Certificate(settings) if settings.tls_cert else None
