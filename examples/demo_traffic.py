"""Sends a running demo server some thousand tokens of traffic in three domains, for the dashboard to show.

    python examples/demo_traffic.py [--base-url URL] [--rounds N]

Every request is labelled with its domain. Nothing is reset.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.test_client import DEFAULT_BASE_URL, APIError, MixedPrecisionAPIClient

PROMPTS = {
    "prose": ["It was a dark and stormy night, and", "The captain looked at the sea and said"],
    "verse": ["床前明月光，", "春眠不觉晓，"],
    "code": ["def fibonacci(n):\n", "class Stack:\n    def __init__(self):\n"],
}
NUM_TOGETHER = 6


def send(client: MixedPrecisionAPIClient, num_rounds: int, max_new_tokens: int) -> dict[str, int]:
    """Domain → tokens that were computed. Requests run several at a time."""
    requests = [
        (domain, prompt, seed) for seed in range(num_rounds) for domain in PROMPTS for prompt in PROMPTS[domain]
    ]

    def generate(request: tuple[str, str, int]) -> tuple[str, int]:
        domain, prompt, seed = request
        answer = client.generate_text(prompt, domain=domain, seed=seed, max_new_tokens=max_new_tokens)
        return domain, answer["total_tokens"]

    totals = dict.fromkeys(PROMPTS, 0)
    with ThreadPoolExecutor(NUM_TOGETHER) as pool:
        for domain, num_tokens in pool.map(generate, requests):
            totals[domain] += num_tokens
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base-url", default=DEFAULT_BASE_URL, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=12, help="each sends every prompt once (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="per request (default: %(default)s)")
    arguments = parser.parse_args()
    client = MixedPrecisionAPIClient(arguments.base_url)
    try:
        for domain, num_tokens in send(client, arguments.rounds, arguments.max_new_tokens).items():
            print(f"{domain}: {num_tokens} tokens")
    except APIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Look at {client.base_url}/dashboard")
    return 0


if __name__ == "__main__":
    sys.exit(main())
