"""Who may ask: keys, administration, other sites' pages, encryption."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
from collections.abc import Mapping
from typing import Any

from amalgam.tools.check.asking import Response
from amalgam.tools.check.contract import Finding, check, failed, passed, skipped, warned
from amalgam.tools.check.failures import CannotTellError
from amalgam.tools.check.target import Target

_REFUSED = (401, 403)
_ABSENT = (404, 405)
_DAY_SECONDS = 86400.0
_FOREIGN_ORIGIN = "https://foreign.example"
# What generates or shows what is served. A body without anything in it makes nothing.
_USER_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages", "/generate",
    "/tokenize",
)  # fmt: skip
# What shows others' traffic, or settings; GET changes nothing.
_ADMIN_PATHS = ("/serving", "/manifest", "/remaps", "/expert_stats", "/get_server_info", "/server_info", "/slots")
# What changes a server. The body is no JSON, so that it changes nothing even where it is let through.
_ADMIN_CHANGES = ("/update_weight_mapping", "/v1/load_lora_adapter", "/collective_rpc", "/update_weights_from_disk")
_NO_JSON = b"{"


@check(
    "access.key",
    "Nobody without a key",
    why="Whoever reaches the port uses the machine, and reads what it serves.",
    remedy="Set keys (server.api_keys, --api-key), or access.require_key: false if a gateway in front asks for them.",
    requests=len(_USER_PATHS) + 2,
)
async def without_key(target: Target) -> Finding:
    open_paths = [path for path, response in (await _as_stranger(target, "")).items() if _is_open(response)]
    if not open_paths:
        return passed("without a key: 401 or 403 at every path that generates", "401 or 403")
    value = f"open without a key: {', '.join(open_paths)}"
    if not target.thresholds.access.require_key:
        return passed(f"{value}; access.require_key is false", "")
    return failed(value, "401 or 403")


async def _as_stranger(target: Target, key: str) -> dict[str, Response]:
    found = {path: await target.post(path, {}, key=key) for path in _USER_PATHS}
    found[target.path] = await target.post(target.path, target.body("Hello", 1), key=key)
    found["/v1/models"] = await target.get("/v1/models", key=key)
    return {path: response for path, response in found.items() if response.status not in _ABSENT}


def _is_open(response: Response) -> bool:
    """It was let through, whatever became of it then."""
    return bool(response.status) and response.status not in (*_REFUSED, 429)


@check(
    "access.wrong_key",
    "Nobody with a wrong key",
    why="A server that only asks whether there is a key is open.",
    remedy="Compare keys, in constant time.",
    requests=5,
)
async def wrong_key(target: Target) -> Finding:
    if _is_open(await target.post(target.path, target.body("Hello", 1), key="")):
        return skipped("The server needs no key: see access.key.")
    wrong = {
        "a random key": f"sk-{secrets.token_hex(16)}",
        "the beginning of the key": target.key[:-1],
        "the key and a letter": f"{target.key}x" if target.key else "",
    }
    for name, key in wrong.items():
        if key and _is_open(await target.post(target.path, target.body("Hello", 1), key=key)):
            return failed(f"answered with {name}", "401 or 403")
    return passed(f"refused {sum(map(bool, wrong.values()))} wrong keys", "401 or 403")


@check(
    "access.admin",
    "Administration needs more than a user's key",
    why="Users could change the weights of all, and see each other's traffic.",
    remedy="Set an admin key (server.admin_key), or let nobody reach these paths from outside.",
    requests=lambda thresholds: len(_ADMIN_PATHS) + len(_ADMIN_CHANGES) + len(thresholds.access.admin_paths),
)
async def administration(target: Target) -> Finding:
    found = {f"GET {p}": await target.get(p) for p in (*_ADMIN_PATHS, *target.thresholds.access.admin_paths)}
    found |= {f"POST {p}": await target.post(p, _NO_JSON) for p in _ADMIN_CHANGES}
    there = {path: response for path, response in found.items() if response.status not in (*_ABSENT, 0, 501)}
    if not there:
        return skipped("No path that is known to change or show the server is there.")
    whose = "a user's key" if target.key else "no key at all"
    if open_paths := [path for path, response in there.items() if _is_open(response)]:
        return failed(f"open with {whose}: {', '.join(open_paths)}", "401 or 403")
    return passed(f"{len(there)} paths are closed to {whose}", "401 or 403")


@check(
    "access.metrics",
    "Metrics are not for everybody",
    why="They tell how much is asked, by whom, and of which model.",
    remedy="Ask for a key at /metrics, or let only Prometheus reach it.",
    requests=1,
)
async def metrics(target: Target) -> Finding:
    path = target.thresholds.monitoring.metrics_path
    response = await target.get(path, key="")
    if response.status in _ABSENT:
        return skipped(f"There is no {path}.")
    if response.status in _REFUSED:
        return passed(f"{path} needs a key")
    if target.thresholds.access.keyless_metrics:
        return passed(f"{path} is open; access.keyless_metrics allows it")
    return failed(f"{path} is open without a key", "401 or 403")


@check(
    "access.origins",
    "Pages of other sites",
    why="A page that a user visits can use the server from his browser, past every firewall.",
    remedy="Name the sites that may (server.allowed_origins), not `*`, and allow no credentials.",
    requests=2,
)
async def origins(target: Target) -> Finding:
    asked = {"Origin": _FOREIGN_ORIGIN, "Access-Control-Request-Method": "POST"}
    before = await target.get(target.path, method="OPTIONS", key="", headers=list(asked.items()))
    simple = await target.get("/v1/models", headers=[("Origin", _FOREIGN_ORIGIN)])
    allowed = {response.headers.get("access-control-allow-origin", "") for response in (before, simple)}
    credentials = any(
        response.headers.get("access-control-allow-credentials", "").lower() == "true" for response in (before, simple)
    )
    if _FOREIGN_ORIGIN in allowed and credentials:
        return failed("any site's pages may ask, with the user's credentials", "not allowed")
    if allowed & {"*", _FOREIGN_ORIGIN}:
        return warned("any site's pages may ask", "not allowed")
    return passed("a foreign site's page is not allowed", "not allowed")


@check(
    "access.encryption",
    "Encryption",
    why="Keys and prompts cross the network in the clear.",
    remedy="TLS in the server (server.tls_cert) or in a proxy in front; renew certificates in time.",
)
async def encryption(target: Target) -> Finding:
    if target.address.scheme == "http":
        if target.is_loopback:
            return skipped("http on this machine's loopback address: nobody else hears it.")
        return warned(f"http to {target.address.host}", "https")
    try:
        certificate = await certificate_of(target)
    except (OSError, TimeoutError) as error:
        raise CannotTellError(f"No TLS connection: {error}.") from None
    days = (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / _DAY_SECONDS
    least = target.thresholds.access.certificate_days
    value, threshold = f"https; the certificate holds for {days:.0f} days", f"≥ {least:g} days"
    return (failed if days < 0 else warned if days < least else passed)(value, threshold, figures={"days": days})


async def certificate_of(target: Target) -> Mapping[str, Any]:
    async with asyncio.timeout(target.thresholds.timeout_seconds):
        _, writer = await asyncio.open_connection(target.address.host, target.address.port, ssl=target.address.tls)
        certificate: Mapping[str, Any] = writer.get_extra_info("peercert")
        writer.close()
    return certificate
