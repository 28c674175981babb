"""Which key each endpoint needs, and which of them take a place in the queue.

In: methods and paths. Out: permissions. What changes the server or shows others' traffic needs the admin key; probes,
and pages that show nothing by themselves, need none; the rest needs a key. An endpoint that is not listed here needs
the admin key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from amalgam.server.http.keys import Needs, Permission

KEYLESS = {"/", "/health", "/v1/health", "/ping", "/ready", "/version", "/dashboard", "/docs", "/openapi.json"}
KEYLESS_BELOW = ("/dashboard/static/", "/static/")
# For everyone with a key: generation, and what is served.
WITH_KEY = {"/generate", "/batch_generate", "/model_info", "/experts/precision_map", "/tokenize", "/detokenize"}
WITH_KEY |= {"/dashboard/chat", "/metrics", "/summarize", "/weights", "/models", "/chat/completions", "/props"}
WITH_KEY_BELOW = ("/v1/",)
# Of those, what waits in the queue for its turn to be computed.
QUEUED = {"/generate", "/batch_generate", "/summarize", "/dashboard/chat", "/chat/completions", "/v1/chat/completions"}
QUEUED |= {"/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"}
WITH_ADMIN_KEY = {
    "/update_weight_mapping", "/reload_weights", "/reset_expert_stats", "/export_expert_stats", "/expert_stats",
    "/serving", "/remaps", "/manifest", "/autoplan", "/explain", "/filters",
}  # fmt: skip
WITH_ADMIN_KEY_BELOW = ("/experts/", "/dashboard/", "/weights/", "/filters/")


def needs_of(path: str) -> Needs | None:
    """What is listed for a path, which may end with a slash: that leads to the page. None: nothing is."""
    path = path if len(path) == 1 else path.removesuffix("/")
    if path in KEYLESS or path.startswith(KEYLESS_BELOW):
        return Needs.NOTHING
    if path in WITH_KEY or path.startswith(WITH_KEY_BELOW):
        return Needs.KEY
    return Needs.ADMIN if path in WITH_ADMIN_KEY or path.startswith(WITH_ADMIN_KEY_BELOW) else None


def permissions(paths: Iterable[str], *, keyless_metrics: bool) -> Callable[[str, str], Permission]:
    """The function that `KeyGuard` asks.

    Args:
        paths: of all endpoints, as they are declared.
        keyless_metrics: whether /metrics needs no key.
    """
    unlisted = {path for path in paths if needs_of(path) is None}

    def permission(method: str, path: str) -> Permission:
        if path == "/metrics" and keyless_metrics:
            return Permission(Needs.NOTHING)
        needs = needs_of(path)
        if needs is None:  # of no endpoint, unless it is unlisted: told only to whom the server is open
            return Permission(Needs.ADMIN if path in unlisted else Needs.KEY)
        is_metered = needs is Needs.KEY and method == "POST"
        return Permission(needs, is_metered, takes_place=is_metered and path in QUEUED)

    return permission
