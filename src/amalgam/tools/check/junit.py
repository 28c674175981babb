"""A report as JUnit's XML, which continuous integration shows: a test for each check.

In: a report. Out: XML. A warning is a test that passed, with what was seen as its output.
"""

from __future__ import annotations

import re
from itertools import groupby
from xml.etree import ElementTree as ET

from amalgam.tools.check.contract import Result, Status
from amalgam.tools.check.running import Report

_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(report: Report) -> bytes:
    root = ET.Element("testsuites", _numbers(report.results), name=f"amalgam check {report.target.address}")
    root.set("time", f"{report.seconds:.3f}")
    for category, group in groupby(report.results, lambda result: result.check.category):
        results = list(group)
        suite = ET.SubElement(root, "testsuite", _numbers(results), name=category)
        suite.set("time", f"{sum(result.seconds for result in results):.3f}")
        suite.set("timestamp", report.started.strftime("%Y-%m-%dT%H:%M:%S"))
        for result in results:
            _add_case(suite, result)
    ET.indent(root)
    content: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _numbers(results: list[Result]) -> dict[str, str]:
    statuses = [result.status for result in results]
    return {
        "tests": str(len(results)),
        "failures": str(statuses.count(Status.FAIL)),
        "errors": "0",
        "skipped": str(statuses.count(Status.SKIP)),
    }


def _add_case(suite: ET.Element, result: Result) -> None:
    check, finding = result.check, result.finding
    case = ET.SubElement(suite, "testcase", classname=f"amalgam.check.{check.category}", name=check.id)
    case.set("time", f"{result.seconds:.3f}")
    seen = _plain(f"{finding.value}{f' (expected: {finding.threshold})' if finding.threshold else ''}")
    if result.status is Status.FAIL:
        failure = ET.SubElement(case, "failure", message=seen, type=check.id)
        failure.text = _plain(f"{check.title}\n{check.why}\n{result.remedy}")
    elif result.status is Status.SKIP:
        ET.SubElement(case, "skipped", message=seen)
    else:
        ET.SubElement(case, "system-out").text = f"warning: {seen}" if result.status is Status.WARN else seen


def _plain(text: str) -> str:
    """Without what XML cannot hold."""
    return _FORBIDDEN.sub("\ufffd", text)
