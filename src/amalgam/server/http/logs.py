"""The form of the log: lines for people, or one JSON object each.

In: log records; what an access line tells is in their attribute `fields`. Out: text. A record is always one line, but
for a traceback in the form for people.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JSONFormatter(logging.Formatter):
    """Time in UTC (RFC 3339), level, logger and message; and beside them the fields that the record brings."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(entry, default=str).decode()
        except TypeError:  # half a surrogate pair
            return orjson.dumps({key: repr(value) for key, value in entry.items()}).decode()


def start_logging(form: Literal["text", "json"]) -> None:
    """Have the whole process log to its standard error output."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
