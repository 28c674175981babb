"""Where the server listens, and who is warned: Unix sockets, https, a path behind a proxy."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from amalgam.errors import ConfigError
from amalgam.server.app import reloading, warn_if_open
from amalgam.server.http.keys import KeyRing
from amalgam.server.http.lifecycle import listen
from amalgam.server.http.tls import Certificate, certificate_of
from amalgam.server.http.unix import MAX_PATH_BYTES, UnixListener
from tests.errors import raises
from tests.server.conftest import serving, wait_until
from tests.server.fakes import FakeDeployment, fake_settings

GENERATE = {"prompt": "a", "max_new_tokens": 2}
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates")


def unix_client(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=60)


def test_a_unix_socket_is_served_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    for mode in ("600", "660"):
        settings = fake_settings(unix_socket=str(path), unix_socket_mode=mode)
        with serving(settings, FakeDeployment) as url:
            assert url == f"unix:{path}"
            assert stat.S_IMODE(path.stat().st_mode) == int(mode, 8)
            with unix_client(path) as client:
                wait_until(lambda: client.get("/ready").status_code == 200)
                assert client.post("/generate", json=GENERATE).json()["generated_text"] == "w0 w1 "
                assert client.post("/generate", json={**GENERATE, "stream": True}).text.endswith("data: [DONE]\n\n")
                assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
        assert list(tmp_path.iterdir()) == []


def test_a_socket_that_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with serving(fake_settings(unix_socket=str(path)), FakeDeployment), unix_client(path) as client:
        assert client.get("/health").status_code == 200


def test_two_servers_do_not_take_each_other_s_socket(tmp_path: Path) -> None:
    settings = fake_settings(unix_socket=str(tmp_path / "server.sock")).server
    [first] = listen(settings)
    with raises(ConfigError, os.getpid()):
        listen(settings)
    first.close()
    [second] = listen(settings)
    assert isinstance(second, UnixListener)
    second.close()


def test_a_socket_of_another_program_stays(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with raises(ConfigError, path):
            listen(fake_settings(unix_socket=str(path)).server)
        assert path.exists()


@pytest.mark.parametrize("name", ["file", "folder", "x" * MAX_PATH_BYTES, "no/such/folder"])
def test_where_no_socket_can_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with raises(ConfigError):
        listen(fake_settings(unix_socket=str(tmp_path / name)).server)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Makes a certificate for localhost and its key."""

    def make(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        cert, key = folder / "cert.pem", folder / "key.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
            check=True, capture_output=True,
        )  # fmt: skip
        return cert, key

    return make


def der_of(cert: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(cert.read_text())


def shown_by(certificate: Certificate) -> bytes | None:
    """The certificate that a connection gets, in DER."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(to_client, to_server)
    server = certificate.context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        with contextlib.suppress(ssl.SSLWantReadError):  # the other side's turn
            side.do_handshake()
    return client.getpeercert(binary_form=True)


@needs_openssl
def test_https(make_pair: Callable[[str], tuple[Path, Path]]) -> None:
    cert, key = make_pair("one")
    settings = fake_settings(port=0, tls_cert=str(cert), tls_key=str(key))
    context = ssl.create_default_context(cafile=cert)
    with serving(settings, FakeDeployment) as url, httpx.Client(base_url=url, verify=context, timeout=60) as client:
        assert url.startswith("https://")
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert client.post("/generate", json={**GENERATE, "stream": True}).text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/health", timeout=60)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        assert httpx.get(url + "/health", verify=context, timeout=60).status_code == 200


@needs_openssl
def test_a_certificate_is_read_again_and_a_bad_one_changes_nothing(
    make_pair: Callable[[str], tuple[Path, Path]],
) -> None:
    cert, key = make_pair("old")
    new_cert, new_key = make_pair("new")
    settings = fake_settings(port=0, tls_cert=str(cert), tls_key=str(key))
    certificate = certificate_of(settings.server)
    assert certificate is not None
    old = der_of(cert)
    assert shown_by(certificate) == old
    cert.write_bytes(new_cert.read_bytes())
    with raises(ConfigError, key):  # the key has not followed yet
        certificate.reload()
    assert shown_by(certificate) == old
    key.write_bytes(new_key.read_bytes())
    reload = reloading(settings, KeyRing(settings.server), certificate)
    assert reload is not None
    reload()
    assert shown_by(certificate) == der_of(new_cert) != old


@needs_openssl
def test_certificates_that_cannot_be_used_are_named(
    make_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    cert, key = make_pair("a")
    other = make_pair("b")[1]
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked],
        check=True,
        capture_output=True,
    )
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    missing = tmp_path / "missing.pem"
    for pair, named in (
        ((missing, key), missing), ((cert, missing), missing), ((cert, other), other), ((cert, locked), locked),
        ((nothing, key), nothing), ((cert, nothing), nothing), ((cert, ""), cert), (("", key), "server.tls_cert"),
        ((tmp_path, key), tmp_path),
    ):  # fmt: skip
        with raises(ConfigError, named):
            certificate_of(fake_settings(tls_cert=str(pair[0]), tls_key=str(pair[1])).server)


@needs_openssl
def test_one_file_may_hold_both(make_pair: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    cert, key = make_pair("a")
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    assert shown_by(Certificate(fake_settings(tls_cert=str(both)).server)) == der_of(cert)


def test_a_path_behind_a_proxy_whether_the_proxy_takes_it_away_or_not() -> None:
    settings = fake_settings(port=0, root_path="/llm/a", api_keys=["key"])
    with serving(settings, FakeDeployment) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        for prefix in ("", "/llm/a"):
            assert client.get(f"{prefix}/health").status_code == 200
            assert client.get(f"{prefix}/dashboard/static/page.css").status_code == 200
            for headers, status in (({}, 401), ({"x-api-key": "key"}, 200)):
                response = client.post(f"{prefix}/generate", json=GENERATE, headers=headers)
                assert response.status_code == status
            assert client.post(f"{prefix}/reload_weights", headers={"x-api-key": "key"}).status_code == 403
        schema = client.get("/llm/a/openapi.json").json()
        assert schema["servers"] == [{"url": "/llm/a"}]
        for path in ("/llm", "/llm/ab/health", "/llm/a/llm/a/health"):
            assert client.get(path, headers={"x-api-key": "key"}).status_code == 404
        place = client.get("/llm/a/health/").headers["location"]
        assert httpx.URL(url + "/llm/a/health/").join(place).path == "/llm/a/health"


@pytest.mark.parametrize("path", ["llm", "/llm/", "/", "/a b", "/a?b"])
def test_what_is_no_root_path(path: str) -> None:
    with raises(ConfigError, "server.root_path"):
        fake_settings(root_path=path)


@pytest.mark.parametrize(
    ("host", "keys", "warns"),
    [
        ("0.0.0.0", {}, True),
        ("::", {}, True),
        ("0.0.0.0", {"admin_key": "x"}, True),
        ("0.0.0.0", {"api_keys": "x"}, False),
        ("127.0.0.1", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {"unix_socket": "x"}, False),
    ],
)
def test_an_open_server_is_warned_of(
    host: str, keys: dict[str, str], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = fake_settings(host=host, **keys)
    caplog.set_level(logging.WARNING, "amalgam.server")
    warn_if_open(settings, KeyRing(settings.server))
    assert bool(caplog.records) is warns
    if warns:
        assert "server.api_keys" in caplog.text and host in caplog.text
