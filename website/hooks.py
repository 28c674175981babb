"""What the site has beside the files in docs/: start pages out of the READMEs, references made from the code, checks.

mkdocs calls the functions named `on_…`. A warning fails the build, which is strict.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import typer
from commands import problem_of, shell_lines  # beside this file, whose folder mkdocs looks in
from fastapi import FastAPI
from links import without_links_out
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from amalgam.cli import VERBS, app
from amalgam.server.app import DESCRIPTION, RESPONSES, every_route
from amalgam.server.http.docs import Endpoint, Field, endpoints
from amalgam.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "README.zh-CN.md": "zh.md", "CHANGELOG.md": "changelog.md"}
TITLES = {
    "native": "Native interface",
    "openai": "OpenAI's interface",
    "anthropic": "Anthropic's interface",
    "weights": "Weights",
    "experts": "Experts",
    "operation": "Operation",
}
CHINESE = r"[一-鿿，。；：、（）]"
ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^>]*"
)

logger = logging.getLogger("mkdocs.hooks.site")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put what the navigation does not name where it belongs."""
    assert config.nav is not None
    sections = {name: part for entry in config.nav for name, part in entry.items()}
    named = set(_leaves(config.nav))
    rest = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    for name in sorted(set(rest) - named, key=lambda name: (not name.endswith("README.md"), name)):
        sections["Log" if name.startswith("log/") else "Guides"].append(name)
    http = next(entry["HTTP"] for entry in sections["Reference"] if isinstance(entry, dict) and "HTTP" in entry)
    http += [{_title(tag): f"reference/http/{tag}.md"} for tag in _interfaces()]
    return config


def _leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
        return
    for part in nav.values() if isinstance(nav, dict) else nav:
        yield from _leaves(part)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=_with_links_into_docs((ROOT / source).read_text("utf-8"))))
    files.append(File.generated(config, "reference/commands.md", content=_commands()))
    for path in [*(ROOT / "website/reference").glob("*.md"), *(ROOT / "website/assets").iterdir()]:
        files.append(File.generated(config, path.relative_to(ROOT / "website").as_posix(), abs_src_path=str(path)))
    icon = ROOT / "src/amalgam/server/web/static/icon.svg"
    files.append(File.generated(config, "assets/icon.svg", abs_src_path=str(icon)))
    files.append(File.generated(config, "reference/http/openapi.json", content=json.dumps(_schema(), indent=1)))
    for tag, described in _interfaces().items():
        files.append(File.generated(config, f"reference/http/{tag}.md", content=_interface(_title(tag), described)))
    return files


@cache
def _schema() -> dict[str, Any]:
    """What a server without a model of its own says of its interfaces."""
    api = FastAPI(title="amalgam", version=__version__, description=DESCRIPTION, responses=RESPONSES)
    api.router.routes += every_route()
    return api.openapi()


@cache
def _interfaces() -> dict[str, list[Endpoint]]:
    """The endpoints by their tags; those that have a title here first."""
    found: dict[str, list[Endpoint]] = {tag: [] for tag in TITLES}
    for endpoint in endpoints(_schema()):
        found.setdefault(endpoint.tag or "others", []).append(endpoint)
    return {tag: described for tag, described in found.items() if described}


def _title(tag: str) -> str:
    return TITLES.get(tag, tag.capitalize())


def _with_links_into_docs(text: str) -> str:
    """A document of the root, as one of docs/."""
    text = re.sub(r"\]\(docs/([^)]*)\)", lambda match: f"]({_page(match[1])})", text)
    text = re.sub(rf"(?<={CHINESE})\n(?={CHINESE})", "", text)  # browsers show the end of a line as a space
    for source, name in PAGES.items():
        text = text.replace(f"]({source})", f"]({name})")
    return text


def _page(name: str) -> str:
    return f"{name}/README.md" if (ROOT / "docs" / name).is_dir() else name


def _commands() -> str:
    """Every verb: what it does, its arguments and options."""
    lines = [
        "# Commands\n",
        "`amalgam VERB --help` says the same. Verbs that read a configuration take every setting as a flag too, such "
        "as `--inference.max_seq_length 2048`: [configuration](../configuration.md).\n",
    ]
    group = typer.main.get_command(app)
    for verb in VERBS:
        command = group.get_command(None, verb)
        context = command.make_context(f"amalgam {verb}", [], resilient_parsing=True)
        help_text = re.sub(r"[ \t]+", " ", (command.help or "").replace("\b", "").strip())
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [
            f"## amalgam {verb}\n",
            f"```text\namalgam {verb} {usage}\n```\n",
            f"{escape(help_text, quote=False)}\n",
        ]
        records = [record for each in command.get_params(context) if (record := each.get_help_record(context))]
        rows = [f"| `{_line(names)}` | {_cell(escape(meaning, quote=False))} |" for names, meaning in records]
        lines += ["| option | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _interface(title: str, described: Iterable[Endpoint]) -> str:
    lines = [f"# {title}\n", "`/docs` of a running server says the same. As a schema: [openapi.json](openapi.json).\n"]
    for endpoint in described:
        lines += [
            f"## {endpoint.method} {endpoint.path.replace('_', chr(92) + '_')}\n",
            f"{escape(endpoint.description, quote=False)}\n",
        ]
        for heading, fields in endpoint.tables.items():
            lines += [f"**{heading}**\n", *_fields(fields, has_default=heading != "Answer"), ""]
    return "\n".join(lines)


def _fields(fields: Iterable[Field], has_default: bool) -> Iterator[str]:
    yield "| field | type | default | |" if has_default else "| field | type | |"
    yield "|---|---|---|---|" if has_default else "|---|---|---|"
    for field in fields:
        default = f" {_cell(escape(field.default, quote=False))} |" if has_default else ""
        kind, meaning = (_cell(escape(text, quote=False)) for text in (field.kind, field.description))
        yield f"| `{field.name}` | {kind} |{default} {meaning} |"


def _line(text: str) -> str:
    """Text on one line, which no table takes apart."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def _cell(text: str) -> str:
    """The same where Markdown has a meaning."""
    return re.sub(r"([*\[])", r"\\\1", _line(text))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Check the commands of a document. Its links to files of the root lead to their pages, if they have any."""
    for line in shell_lines(markdown):
        if problem := problem_of(line):
            logger.warning("%s: %s: %s", page.file.src_uri, problem, line)
    for source, name in PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({name})").replace(f"](../../{source})", f"](../{name})")
    return without_links_out(markdown, ROOT / "docs" / page.file.src_uri, ROOT / "docs")


def on_page_content(html: str, **_: Any) -> str:
    """Mark code that is short enough to stand on one line: browsers break `--flag` after its hyphens."""
    return re.sub(r"<code>(?=[^<]{1,40}</code>)", '<code class="short">', html)


def on_post_build(config: MkDocsConfig) -> None:
    """Check that no page fetches anything from elsewhere."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        if found := ELSEWHERE.search(path.read_text("utf-8")):
            logger.warning("%s fetches from elsewhere: %s", path.name, found[0][:200])
