"""What a client wants to be answered with.

In: an Accept header. Out: whether it asks for a page.
"""

from __future__ import annotations


def prefers_html(accept: str) -> bool:
    """Whether an Accept header names HTML, and no other type than HTML before JSON (RFC 9110, 12.5.1)."""
    weights: dict[str, float] = {}
    for item in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((text.removeprefix("q=") for text in parameters if text.startswith("q=")), "1")
        try:
            weights[media_type] = float(quality)
        except ValueError:
            weights[media_type] = 0.0
    html = weights.get("text/html", 0.0)
    json = next((weights[name] for name in ("application/json", "application/*", "*/*") if name in weights), 0.0)
    return html > 0 and html > json
