"""`amalgam evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amalgam.cli.options import with_settings
from amalgam.config.settings import Settings
from amalgam.errors import ConfigError


@with_settings(shown=("inference.dtype",))
def command(
    settings: Settings,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="[NAME=]FILE",
            help="Text to measure on, and its name: .txt, .jsonl, or a .json list of texts. Repeatable.",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG.yaml", help="Compare with this configuration. Default: every weight from base."),
    ] = None,
    versus: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG.yaml|MODEL", help="Compare two models side by side: size, speed and quality of each."
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens computed as one prompt.")] = 256,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens, divided equally among the files, from documents drawn at random."),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Measure the effect of each weight in each source of the configuration."),
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --sensitivity: folder that keeps results between runs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure a configuration on texts: perplexity, KL divergence from a reference, top-1 agreement."""
    from amalgam.cli.console import note, print_json, progress_bar
    from amalgam.config.reading import load_settings
    from amalgam.tools.evaluate import TextOptions, compare_models, evaluate

    texts = TextOptions(text or [], window, tokens)
    modes = {"--reference": reference, "--versus": versus, "--sensitivity": sensitivity or None}
    given = [name for name, value in modes.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are given.", remedy="Give one of them.")
    if cache is not None and not sensitivity:
        raise ConfigError("--cache is given without --sensitivity.", remedy="Add --sensitivity.")
    if sensitivity:
        from amalgam.cli.sensitivity_view import show_sensitivities

        show_sensitivities(settings, texts, cache, as_json=as_json)
        return
    report: Any
    with progress_bar(unit="tokens") as progress:
        if versus is not None:
            second = (
                load_settings(versus)
                if versus.endswith((".yaml", ".yml"))
                else settings.replace(model={"base_path": versus})
            )
            report = compare_models(settings, second, texts, progress)
        else:
            other = None if reference is None else load_settings(reference)
            report = evaluate(settings, other, texts, progress)
    if as_json:
        print_json(report.as_json())
        return
    if versus is None:
        _show(report)
    else:
        _show_two(report)
    for remark in report.remarks:
        note(remark)


def _show(report: Any) -> None:
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import interval, print_table, say

    def row(name: str, quality: Any) -> tuple[str, ...]:
        return (
            name,
            f"{quality.num_tokens:,}",
            f"{quality.num_units:,}",
            interval(quality.perplexity, "{:.2f}"),
            f"{report.reference_domains[name].perplexity.value:.2f}",
            interval(quality.divergence, "{:.5f}"),
            interval(quality.percentile_99, "{:.3f}"),
            interval(quality.percentile_999, "{:.3f}"),
            interval(quality.agreement, "{:.2%}"),
        )

    columns = ("domain", "tokens", report.unit, "perplexity", "reference", "KL divergence", "99%", "99.9%", "top-1")
    print_table(columns, [row(*item) for item in report.domains.items()], f"{report.plan} against {report.reference}")
    say(
        f"Weights: {human_bytes(report.plan_bytes)} against {human_bytes(report.reference_bytes)}. Divergence in nats "
        f"a token; in brackets 95% confidence intervals, which resample {report.unit}."
    )


def _show_two(report: Any) -> None:
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import interval, print_table, say

    sides = (report.first, report.second)
    rows = [
        ("parameters", *(f"{side.num_parameters:,}" for side in sides), ""),
        ("active for a token", *(f"{side.num_active_parameters:,}" for side in sides), ""),
        ("weights", *(human_bytes(side.weights_bytes) for side in sides), _share(report, "weights_bytes")),
        *(
            (f"{name}, tokens/s", *(f"{side.speed.get(name, 0):.1f}" for side in sides), _share(report, name))
            for name in report.first.speed
        ),
        ("perplexity", *(interval(side.quality.perplexity, "{:.2f}") for side in sides), ""),
        ("bits per byte", *(interval(side.quality.bits_per_byte, "{:.3f}") for side in sides), ""),
    ]
    for name in ("loss", "bits_per_byte"):
        if name in report.differences:
            rows.append((f"difference of {name.replace('_', ' ')}", "", "", _share(report, name)))
    if report.divergence is not None:
        rows.append(("KL divergence of the second", "", interval(report.divergence.divergence, "{:.5f}"), ""))
        rows.append(("equal first choices", "", interval(report.divergence.agreement, "{:.2%}"), ""))
    print_table(("", report.first.name, report.second.name, "second to first"), rows)
    say(f"In brackets 95% confidence intervals, which resample {report.unit}.")


def _share(report: Any, name: str) -> str:
    from amalgam.cli.console import interval

    return interval(report.differences[name], "{:+.1%}") if name in report.differences else ""
