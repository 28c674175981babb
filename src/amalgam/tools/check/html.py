"""A report as one HTML page: no scripts, nothing fetched from elsewhere, every text of the server escaped.

In: a report. Out: a page that can be mailed or archived.
"""

from __future__ import annotations

from html import escape
from itertools import groupby

from amalgam.base.counting import counted
from amalgam.tools.check.contract import CATEGORIES, Result, Status
from amalgam.tools.check.running import Report

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_WORDS = {Status.PASS: "passed", Status.WARN: "warnings", Status.FAIL: "failed", Status.SKIP: "skipped"}
_SIGNS = {Status.PASS: "✓", Status.WARN: "!", Status.FAIL: "✕", Status.SKIP: "–"}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --pass: #1a7f37; --warn: #9a6700; --fail: #cf222e;
  --skip: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --pass: #3fb950; --warn: #d29922; --fail: #f85149; --skip: #8b949e; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .2rem 0; } .note { opacity: .75; overflow-wrap: anywhere; }
.verdict { font-size: 1.2rem; font-weight: 600; margin: 1rem 0; }
.counts { display: flex; flex-wrap: wrap; gap: .75rem; }
.counts div { border: 1px solid var(--line); border-left: .35rem solid; border-radius: .4rem; padding: .3rem .9rem;
  min-width: 6rem; }
.counts b { display: block; font-size: 1.4rem; }
.check { border: 1px solid var(--line); border-left: .35rem solid; border-radius: .4rem; margin: .4rem 0;
  padding: .45rem .9rem; }
.check > div, .check > p { color: CanvasText; } .counts span { color: CanvasText; }
.check header { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: baseline; }
.check header b { color: CanvasText; } .check code { font-size: .85rem; opacity: .7; color: CanvasText; }
.sign { font-weight: 700; width: 1.1rem; text-align: center; } .value { overflow-wrap: anywhere; }
.check time { margin-left: auto; font-size: .85rem; opacity: .7; color: CanvasText; }
.pass { border-left-color: var(--pass); color: var(--pass); } .warn { border-left-color: var(--warn);
  color: var(--warn); } .fail { border-left-color: var(--fail); color: var(--fail); }
.skip { border-left-color: var(--skip); color: var(--skip); }
.remedy { background: var(--soft); border-radius: .3rem; padding: .3rem .6rem; margin-top: .3rem; }
@media print { .check { break-inside: avoid; } }
"""


def render_html(report: Report, *, is_strict: bool = False) -> str:
    """The whole page."""
    target = report.target
    title = f"Is {escape(target.model)} ready?"
    is_ready = report.is_ready(is_strict=is_strict)
    verdict = "Ready: nothing failed." if is_ready else "Not ready."
    notes = [
        f"{escape(str(target.address))}, {report.started.strftime('%Y-%m-%d %H:%M:%S')} UTC",
        f"{counted(len(report.results), 'check')}, {counted(target.num_requests, 'request')}, {report.seconds:.0f} s, "
        f"thresholds of {escape(target.thresholds.profile)}",
        *(escape(note) for note in target.notes),
    ]
    counts = "".join(
        f'<div class="{status}"><b>{count}</b><span>{_WORDS[status]}</span></div>'
        for status, count in report.counts.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"{''.join(f'<p class=note>{note}</p>' for note in notes)}"
        f'<p class="verdict {"pass" if is_ready else "fail"}">{verdict}</p><div class="counts">{counts}</div>'
        f"{_faults(report)}{''.join(_sections(report))}</body></html>\n"
    )


def _faults(report: Report) -> str:
    """Where to begin: what failed, then what warned."""
    faults = [result for status in (Status.FAIL, Status.WARN) for result in report.results if result.status is status]
    if not faults:
        return ""
    items = "".join(
        f'<li class="{result.status}"><a href="#{result.check.id}">{escape(result.check.title)}</a></li>'
        for result in faults
    )
    return f"<h2>What to mend</h2><ul>{items}</ul>"


def _sections(report: Report) -> list[str]:
    return [
        f"<h2>{escape(CATEGORIES[category])}</h2>{''.join(map(_entry, results))}"
        for category, results in groupby(report.results, lambda result: result.check.category)
    ]


def _entry(result: Result) -> str:
    check, finding, status = result.check, result.finding, result.status
    threshold = f'<span class="note"> · expected: {escape(finding.threshold)}</span>' if finding.threshold else ""
    has_fault = status in (Status.WARN, Status.FAIL)
    help_ = (
        f'<p class="note">{escape(check.why)}</p><p class="remedy">{escape(result.remedy)}</p>'
        if has_fault
        else (f'<p class="note">{escape(finding.remedy)}</p>' if finding.remedy else "")
    )
    return (
        f'<section class="check {status}" id="{check.id}"><header><span class="sign" title="{_WORDS[status]}">'
        f"{_SIGNS[status]}</span><b>{escape(check.title)}</b><code>{check.id}</code>"
        f"<time>{result.seconds:.1f} s</time></header>"
        f'<div class="value">{escape(finding.value)}{threshold}</div>{help_}</section>'
    )
