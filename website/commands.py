"""The commands that documents show: whether there are such verbs and options.

In: Markdown. Out: its command lines, and what is wrong with one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import typer

from amalgam.cli import VERBS, app

OURS = ("amalgam", ".venv/bin/amalgam")


def shell_lines(markdown: str) -> Iterator[str]:
    """The commands in a document; what a console prints is none."""
    for kind, block in re.findall(r"^```(bash|sh|console)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if kind != "console" or line.startswith("$ "):
                yield line.removeprefix("$ ")


def problem_of(line: str) -> str | None:
    """What is wrong with the commands of ours in a line, an unknown verb or option; None: nothing."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError as error:
        return str(error)
    command: list[str] = []
    for word in [*words, ";"]:
        if not set(word) <= set("|&;"):
            command.append(word)
            continue
        if command and command[0] in OURS and (problem := _problem(command[1:])):
            return problem
        command = []
    return None


def _problem(words: list[str]) -> str | None:
    verbs = [verb for verb in VERBS if words[: len(verb.split())] == verb.split()]
    if not verbs:
        return f"there is no verb {words[0]!r}" if words and not words[0].startswith("-") else None
    command = typer.main.get_command(app).get_command(None, max(verbs, key=len))
    known = {name for each in command.params for name in [*each.opts, *each.secondary_opts]} | {"-h", "--help"}
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    return f"unknown options {sorted(given - known)}" if given - known else None
