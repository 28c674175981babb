"""Tries other weights on a running demo server: two named plans side by side, a shadow, and a canary with its verdict.

    python examples/try_weights.py [--base-url URL] [--requests N]

At the end new requests run on the candidate if the canary's verdict is to promote it; the names are taken away.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.demo_traffic import NUM_TOGETHER, PROMPTS
from examples.test_client import DEFAULT_BASE_URL, APIError, MixedPrecisionAPIClient

EXPERTS = "model.layers.*.mlp.experts.*"
PLANS: dict[str, dict[str, Any]] = {
    "careful": {"rules": []},  # everything as the model has it
    "small": {"rules": [{"pattern": EXPERTS, "source": "int4"}]},
}
WAIT_SECONDS = 300.0


def side_by_side(client: MixedPrecisionAPIClient) -> None:
    """The same prompts, greedily, on both plans."""
    for name, plan in PLANS.items():
        made = client.call("PUT", f"/weights/named/{name}", plan)
        print(
            f"{name}: version {made['weight_version']}, {made['num_loaded']} weights loaded in {made['seconds']:.2f} s"
        )
    print("\n| prompt | weights | version | answer |\n|---|---|---|---|")
    for prompt in (PROMPTS["prose"][0], PROMPTS["code"][0]):
        for name in ("current", *PLANS):
            answer = client.generate_text(prompt, weights=name, do_sample=False, max_new_tokens=16)
            print(f"| `{prompt!r}` | {name} | {answer['weight_version']} | `{answer['generated_text']!r}` |")


def send(client: MixedPrecisionAPIClient, count: int, first_seed: int) -> list[int]:
    """Traffic that asks for no weights; the version that each request ran on."""
    prompts = [prompt for texts in PROMPTS.values() for prompt in texts]

    def generate(index: int) -> int:
        seed, prompt = first_seed + index, prompts[index % len(prompts)]
        answer = client.generate_text(prompt, seed=seed, max_new_tokens=24)
        return int(answer["weight_version"])

    with ThreadPoolExecutor(NUM_TOGETHER) as pool:
        return list(pool.map(generate, range(count)))


def shadow(client: MixedPrecisionAPIClient, count: int) -> None:
    """Requests that the current weights answer are computed with the plan `small` too."""
    client.call(
        "PUT", "/weights/shadow", {"weights": "small", "share": 1.0, "max_requests": count, "min_requests": count // 2}
    )
    deadline = time.monotonic() + WAIT_SECONDS
    first_seed = 0
    while (report := client.call("GET", "/weights/shadow"))["requests"] < count and time.monotonic() < deadline:
        if report["state"] != "running":
            break
        send(client, NUM_TOGETHER, first_seed)
        first_seed += NUM_TOGETHER
    report = client.call("DELETE", "/weights/shadow")
    figures = report["figures"]
    print(f"\n{figures['num_requests']} requests, {figures['num_tokens']} tokens of answers\n")
    show(report)
    for name in ("prompt_time", "token_time"):
        times = figures[name]
        print(f"{name}: {times['now'] * 1e3:.2f} → {times['candidate'] * 1e3:.2f} ms, ratio {interval(times['ratio'])}")
    print(f"perplexity: {interval(figures['perplexity_now'])} → {interval(figures['perplexity_candidate'])}")


def canary(client: MixedPrecisionAPIClient, count: int) -> None:
    """A third of the requests runs on the plan `careful`; what the verdict says is done."""
    client.call("PUT", "/weights/canary", {"weights": "careful", "share": 0.3, "min_requests": count // 5})
    versions = send(client, count, 10_000)
    report = client.call("GET", "/weights/canary")
    shares = {version: versions.count(version) for version in sorted(set(versions))}
    print(f"\nrequests by version: {shares}\n")
    print("| weights | requests | errors | first token, ms | next tokens, ms |\n|---|---|---|---|---|")
    for name, arm in report["arms"].items():
        times = (f"{arm[key] * 1e3:.1f}" for key in ("first_token_seconds", "token_seconds"))
        print(f"| {name} | {arm['requests']} | {arm['errors']} | {' | '.join(times)} |")
    print()
    show(report)
    if report["verdict"]["outcome"] == "promote":
        print(f"promoted: version {client.call('POST', '/weights/canary/promote')['weight_version']}")
    else:
        print(f"ended: {client.call('DELETE', '/weights/canary')['state']}")


def show(report: dict[str, Any]) -> None:
    print("| check | figure | limit | outcome |\n|---|---|---|---|")
    for check in report["checks"]:
        sign = "≤" if check["is_most"] else "≥"
        print(f"| {check['name']} | {interval(check['value'])} | {sign} {check['limit']:g} | {check['outcome']} |")
    verdict = report["verdict"]
    print(f"\nverdict: {verdict['outcome']}. {verdict['reason']}\n")


def interval(value: dict[str, float | None]) -> str:
    if value["low"] is None:
        return f"{value['value']:.4g}"
    return f"{value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base-url", default=DEFAULT_BASE_URL, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=300, help="of the canary; a fifth is compared (%(default)s)")
    arguments = parser.parse_args()
    client = MixedPrecisionAPIClient(arguments.base_url)
    try:
        print("## Two plans side by side\n")
        side_by_side(client)
        print("\n## Shadow: small beside the current weights")
        shadow(client, max(10, arguments.requests // 5))
        print("\n## Canary: careful, for 30% of the requests")
        canary(client, arguments.requests)
        for name in PLANS:
            client.call("DELETE", f"/weights/named/{name}")
    except APIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
