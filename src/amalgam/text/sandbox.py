"""Chat templates → texts, in a process that does nothing else and can be lost.

In: messages on the standard input: the number of bytes, in eight, then JSON with `source`, `variables` and `mark`.
Out: in the same way, `T` and the text, or `E` and what is wrong. Runs as a file of its own, without this package.

A template is foreign code. Jinja's sandbox keeps it to the functions and variables that templates are written for
(transformers' documentation "Writing a chat template") and to plain strings, lists and dictionaries. It does not keep a
template from running or growing without end, in loops, recursion or one product. The kernel does, here: what takes more
processor time than `CPU_SECONDS` or more memory than `MAX_BYTES` ends the process. Nor can it open a file.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from functools import cache, lru_cache
from importlib import import_module
from typing import IO, Any

CPU_SECONDS = 0.7
MAX_BYTES = 2**29
MAX_CHARS = 2**26
_NUM_COMPILED = 8

_mark = ""  # stands in texts where no special token may begin


def main() -> None:
    """Answer until the input ends."""
    for late in (
        "jinja2.constants",
        "jinja2.debug",
        "encodings.unicode_escape",
        "pprint",
    ):  # which later could not be opened
        import_module(late)
    _environment()
    time.localtime()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whoever starts this may ignore or block it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for kind, limit in (
        (resource.RLIMIT_AS, MAX_BYTES),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (limit, limit))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (message := read_message(source)) is not None:
        write_message(sink, _answer(json.loads(message)))


def read_message(source: IO[bytes]) -> bytes | None:
    """None: there is none, or it ends too early."""
    head = source.read(8)
    if len(head) < 8:
        return None
    num_bytes = int.from_bytes(head, "big")
    message = source.read(num_bytes)
    return message if len(message) == num_bytes else None


def write_message(sink: IO[bytes], message: bytes) -> None:
    sink.write(len(message).to_bytes(8, "big") + message)
    sink.flush()


def _answer(asked: dict[str, Any]) -> bytes:
    global _mark
    _mark = asked["mark"]
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # whose signal ends the process
    try:
        text: str = _compiled(asked["source"]).render(asked["variables"])
        if len(text) > MAX_CHARS:
            raise ValueError(f"it makes a text of more than {MAX_CHARS} characters")
        return b"T" + text.encode("utf-8", "surrogatepass")
    except MemoryError:
        return b"E" + f"it takes more than {MAX_BYTES} bytes of memory".encode()
    except Exception as error:
        return b"E" + f"{error}".encode("utf-8", "replace")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@lru_cache(_NUM_COMPILED)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


def raise_exception(message: Any) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(str(message))


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter it escapes nothing for HTML."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace(json.dumps(_mark)[1:-1], _mark) if ensure_ascii and _mark else text


@cache
def _environment() -> Any:
    from jinja2 import ext, nodes, sandbox, utils
    from jinja2.exceptions import SecurityError

    class Generation(ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks an answer for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(utils.Namespace):
        """Takes no name with an underscore in front, through which a template could leave the sandbox."""

        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            utils.Namespace.__init__(self)
            for name, value in dict(*rest, **values).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}")
            super().__setitem__(name, value)

    class Dict:
        """`dict` and `dict.fromkeys`, without the methods of the type, which would change foreign objects."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
            return dict.fromkeys(keys, value)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": Namespace,
        "dict": Dict(),
    }
    return environment


if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])
    main()
