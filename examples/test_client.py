"""A client for the native REST interface, in nothing but the standard library.

    from examples.test_client import MixedPrecisionAPIClient
    client = MixedPrecisionAPIClient("http://127.0.0.1:8080")
    print(client.generate_text("Once upon a time", max_new_tokens=50)["generated_text"])

Run as a script, it calls every endpoint of a running server: python examples/test_client.py [--base-url URL]
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator
from http.client import HTTPException, HTTPResponse
from typing import Any

DEFAULT_BASE_URL = "http://127.0.0.1:8080"


class APIError(Exception):
    """The server refused a request, or could not be reached (`status` 0)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status
        self.message = message


class MixedPrecisionAPIClient:
    """One method per endpoint; each returns the answer's JSON as a dict and raises `APIError`.

    Args:
        base_url: where the server listens.
        timeout: seconds without a byte from the server before giving up.
    """

    def __init__(self, base_url: str = DEFAULT_BASE_URL, timeout: float = 300.0) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout

    def health_check(self) -> dict[str, Any]:
        """`status`, `model`, `version`, `weight_version`, `uptime_seconds`."""
        return self._call("GET", "/")

    def generate_text(self, prompt: str, **params: Any) -> dict[str, Any]:
        """Continue a prompt. `params`: max_new_tokens, temperature, top_p, top_k, do_sample, seed, stop, ..."""
        return self._call("POST", "/generate", {"prompt": prompt, **params})

    def stream_text(self, prompt: str, **params: Any) -> Generator[str, None, None]:
        """Continue a prompt; yields the text as it comes. Leaving the loop early cancels the request."""
        body = {"prompt": prompt, **params, "stream": True}
        with self._open("POST", "/generate", body) as response:
            try:
                for line in response:
                    name, _, data = line.decode().strip().partition(":")
                    if name != "data":  # an empty line ends an event, and a comment keeps the connection open
                        continue
                    if data.strip() == "[DONE]":
                        return
                    if data:
                        event = json.loads(data)
                        if "error" in event:
                            raise APIError(response.status, event["error"]["message"])
                        yield event["text"]
            except (OSError, HTTPException) as error:
                raise APIError(0, f"The stream from {self.base_url} broke: {error}") from None
        raise APIError(0, f"The stream from {self.base_url} ended without [DONE].")

    def batch_generate(self, prompts: list[str], **params: Any) -> dict[str, Any]:
        """Continue several prompts together: `prompts`, `generated_texts`, `details`, in the same order."""
        return self._call("POST", "/batch_generate", {"prompts": prompts, **params})

    def get_model_info(self) -> dict[str, Any]:
        """Architecture, sizes, sources, bytes by precision, memory."""
        return self._call("GET", "/model_info")

    def update_weight_mapping(self, weight_mapping: dict[str, str], details: bool = False) -> dict[str, Any]:
        """Take the named weights from other sources: `{name or pattern: source}`. `details`: list every change."""
        return self._call("POST", "/update_weight_mapping", {"weight_mapping": weight_mapping, "details": details})

    def reload_weights(self) -> dict[str, Any]:
        """Build the weights anew from the files as they are now."""
        return self._call("POST", "/reload_weights")

    def get_expert_stats(self, top_k: int | None = None, minutes: float | None = None) -> dict[str, Any]:
        """Which experts were used, in all or in the last `minutes`, with the `top_k` busiest."""
        given = {"top_k": top_k, "minutes": minutes}
        return self._call("POST", "/expert_stats", {key: value for key, value in given.items() if value is not None})

    def reset_expert_stats(self) -> dict[str, Any]:
        """Forget all counts; returns what they were."""
        return self._call("POST", "/reset_expert_stats")

    def export_expert_stats(self, format: str = "json") -> dict[str, Any]:
        """Write the statistics to a file on the server ("json" or "csv"): `file_name`, `content`."""
        return self._call("POST", "/export_expert_stats", {"format": format})

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Any other endpoint, as `/docs` of the server has it."""
        return self._call(method, path, body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._open(method, path, body) as response:
            try:
                answer: dict[str, Any] = json.load(response)
            except (OSError, HTTPException, ValueError) as error:
                raise APIError(0, f"The answer of {self.base_url}{path} broke: {error}") from None
        return answer

    def _open(self, method: str, path: str, body: dict[str, Any] | None) -> HTTPResponse:
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base_url + path, data, headers, method=method)
        try:
            response: HTTPResponse = urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            raise APIError(error.code, _message(error)) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise APIError(0, f"No answer from {self.base_url}: {reason}. Is the server running?") from None
        return response


def _message(error: urllib.error.HTTPError) -> str:
    with error:
        text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text or str(error.reason)


def show(title: str, value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)
    lines = text.splitlines()
    print(f"\n== {title}")
    print("\n".join(lines[:24]))
    if len(lines) > 24:
        print(f"... ({len(lines) - 24} more lines)")


def call_everything(client: MixedPrecisionAPIClient, *, resets: bool) -> None:
    """Walk through the interface. The weights are reloaded on the way; the statistics are only reset if `resets`."""
    show("GET /", client.health_check())
    show("GET /model_info", client.get_model_info())
    show("POST /generate", client.generate_text("Once upon a time", max_new_tokens=32, temperature=0.7))

    print("\n== POST /generate, streaming")
    for piece in client.stream_text("床前明月光，", max_new_tokens=32):
        print(piece, end="", flush=True)
    print()

    prompts = ["def fibonacci(n):", "The old man"]
    batch = client.batch_generate(prompts=prompts, max_new_tokens=24)
    show("POST /batch_generate", [f"{p}{t}" for p, t in zip(batch["prompts"], batch["generated_texts"], strict=True)])

    stats = client.get_expert_stats(top_k=5, minutes=5)
    show("POST /expert_stats: summary", stats["summary"])
    show("POST /expert_stats: busiest experts", stats["top_experts"])
    show("POST /export_expert_stats", client.export_expert_stats("csv")["content"])
    if resets:
        show("POST /reset_expert_stats", client.reset_expert_stats())
    else:
        show("POST /reset_expert_stats", "left out: it forgets what the server has counted so far. --reset calls it.")

    show("POST /reload_weights", client.reload_weights())
    try:
        client.update_weight_mapping({"model.layers.0.self_attn.q_proj.weight": "no-such-source"})
    except APIError as error:
        show("POST /update_weight_mapping with an unknown source", str(error))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base-url", default=DEFAULT_BASE_URL, help="default: %(default)s")
    parser.add_argument("--reset", action="store_true", help="reset the server's expert statistics, too")
    arguments = parser.parse_args()
    try:
        call_everything(MixedPrecisionAPIClient(arguments.base_url), resets=arguments.reset)
    except APIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for terminals that cannot show every character
    sys.exit(main())
