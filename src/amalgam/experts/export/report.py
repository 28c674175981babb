"""Statistics → files.

In: an `Overview` and the name of a format. Out: a file's name, media type and content. Must never know who asked, or
where the file goes (`saved.folder.write_file` puts it into a folder).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from amalgam.errors import RequestError, describe
from amalgam.experts.export.html import render_html
from amalgam.experts.export.parquet import write_parquet
from amalgam.experts.export.png import heatmap_png
from amalgam.experts.overview import Overview, build_overview
from amalgam.experts.saved.files import to_npz
from amalgam.experts.statistics import expert_columns, relative_share
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.weights import WeightVersion

FORMATS = ("json", "csv", "parquet", "npz", "png", "html")


@dataclass(frozen=True)
class Export:
    """One file, not yet written."""

    file_name: str
    media_type: str
    content: bytes

    @property
    def is_text(self) -> bool:
        return self.media_type.startswith(("text/", "application/json"))


def export(
    tracker: ExpertTracker,
    format: str = "json",
    *,
    version: WeightVersion | None = None,
    minutes: float | None = None,
    model: str = "",
) -> Export:
    """The statistics as a file.

    Args:
        format: `json` (everything `/expert_stats` answers), `csv` or `parquet` (a row per expert), `npz` (a saved set,
            labels and pairs included), `png` (a heatmap), `html` (a report).
        version: whose precisions the report shows.

    Raises:
        RequestError: `format` is none of these, `minutes` is out of range, or is given for `npz`.
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise RequestError(f"format is {describe(format)}.", remedy=f"Allowed: {', '.join(FORMATS)}.")
    if format == "npz":
        if minutes is not None:
            raise RequestError(
                f"minutes is {describe(minutes)}.", remedy="Leave it out: npz holds all since the reset."
            )
        saved = tracker.saved_set()
        return Export(_file_name(saved.end, format), "application/x-npz", to_npz(saved))
    overview = build_overview(tracker, version, minutes)
    media_type, write = _WRITERS[format]
    return Export(_file_name(overview.snapshot.window_end, format), media_type, write(overview, model))


def _file_name(moment: float, format: str) -> str:
    return f"expert_stats_{datetime.fromtimestamp(moment, UTC).strftime('%Y%m%dT%H%M%S.%fZ')}.{format}"


def _json(overview: Overview, model: str) -> bytes:
    return json.dumps(overview.as_json(), indent=1, allow_nan=False).encode()


def _csv(overview: Overview, model: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = expert_columns(overview.snapshot)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue().encode()


def _parquet(overview: Overview, model: str) -> bytes:
    return write_parquet(expert_columns(overview.snapshot))


def _png(overview: Overview, model: str) -> bytes:
    snapshot = overview.snapshot
    window = "since the last reset" if snapshot.minutes is None else f"in the last {snapshot.minutes:g} minutes"
    captions = (
        f"Expert use of {model or 'a model without a name'}",
        f"{snapshot.tally.num_tokens.sum()} tokens {window}",
    )
    return heatmap_png(relative_share(snapshot.tally.counts.sum(axis=0), snapshot.sizes), snapshot.layer_ids, captions)


def _html(overview: Overview, model: str) -> bytes:
    return render_html(overview, model).encode()


_WRITERS: dict[str, tuple[str, Callable[[Overview, str], bytes]]] = {
    "json": ("application/json", _json),
    "csv": ("text/csv", _csv),
    "parquet": ("application/vnd.apache.parquet", _parquet),
    "png": ("image/png", _png),
    "html": ("text/html", _html),
}
