"""Rules on the tree that the linters cannot check."""

from __future__ import annotations

import ast
import gc
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import LONG, TOGETHER

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "amalgam"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ELSEWHERE = PACKAGE / "tools/quantizing/worker.py"  # a program of its own, for environments that other tools are in
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
CODE_RUNNERS = {"eval", "exec", "compile", "pickle", "marshal", "shelve", "dill", "cloudpickle"}
EXTENSIONS = {"_native", "_mapping"}
# Of the standard library, and of libraries that have no other way.
OF_OTHERS = {"_replace", "_exit", "_registry", "_from_config", "_quantized_data", "_request_id", "_patch_lang"}
# Modules that do without, or that are imported by those who say what to install.
EXTRAS = {
    PACKAGE / "server/http/tracing.py": "tracing",
    **dict.fromkeys((PACKAGE / "cluster/ray").glob("*.py"), "ray"),
}
SENTENCE_LIKE = re.compile(r"\bmatch=|in str\(|[\"'][A-Z][^\"'\n]* [^\"'\n]*[a-z]\.[\"']\s*\)")
PRIVATE_LIKE = re.compile(
    r"(?<!self)(?<!cls)(?<!super\(\))\._[a-z]|[\"']_[a-z]|import.* _[a-z]|^ +_[a-z]\w*,", re.MULTILINE
)
FILE = re.compile(r"`([\w./]*\w\.(?:py|pyi|h|cpp|js|md|txt)|[\w./]+/)(?:::(\w+))?`")
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


@pytest.fixture(scope="module", autouse=True)
def no_look_for_garbage() -> Iterator[None]:
    """The nodes of all modules stay, and to look for garbage among millions of them takes longer than to read them."""
    gc.disable()
    yield
    nodes.cache_clear()
    gc.enable()


@cache
def nodes(module: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))


def places(module: Path, found: list[ast.AST]) -> list[str]:
    return [f"{module.relative_to(ROOT)}:{node.lineno}" for node in found if isinstance(node, ast.expr | ast.stmt)]


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports_between_modules() -> dict[str, set[str]]:
    """Module → those that it imports: at its top, in functions and for types alike."""
    names = {}
    for path in [*MODULES, *PACKAGE.glob("*.pyi")]:  # the extension has a stub only
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        imported = [each for node in nodes(path) for each in imported_names(node)]
        graph[name] = {each if each in names else each.rpartition(".")[0] for each in imported} & names.keys() - {name}
    return graph


def siblings(package: str, graph: dict[str, set[str]], attributes: tuple[str, ...]) -> set[str]:
    """The modules of a package that export one of these."""
    modules = [name for name in graph if name.rpartition(".")[0] == package]
    return {name for name in modules if any(hasattr(importlib.import_module(name), each) for each in attributes)}


def pinned(file: str) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    parsed = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {str(canonicalize_name(requirement.name)): requirement for requirement in parsed}


def declared() -> list[Requirement]:
    """What all need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def extra(name: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["optional-dependencies"][name]]


def test_what_the_source_archive_leaves_out_is_none_of_the_package() -> None:
    """A pattern without a slash at its beginning matches at any depth, and installations are built from the archive."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]
    patterns = settings["sdist"]["exclude"]
    names = {part for path in PACKAGE.rglob("*") for part in path.relative_to(ROOT).parts}
    assert patterns and not names & {pattern.strip("/") for pattern in patterns if not pattern.startswith("/")}


def test_no_module_imports_one_that_imports_it() -> None:
    """Raises CycleError, which names a circle."""
    TopologicalSorter(imports_between_modules()).prepare()


@pytest.mark.parametrize(
    ("package", "attributes", "helpers"),
    [
        ("amalgam.models.families", ("FAMILY",), set()),
        ("amalgam.formats", ("FORMAT", "FORMATS"), {"contract", "registry", "grid", "fused", "common", "declared"}),
    ],
)
def test_no_format_and_no_family_imports_another(package: str, attributes: tuple[str, ...], helpers: set[str]) -> None:
    graph = imports_between_modules()
    found = siblings(package, graph, attributes)
    others = {name for name in graph if name.rpartition(".")[0] == package} - found
    assert {name.rpartition(".")[2] for name in others} == helpers
    for name in found:
        inside = {each for each in graph if f"{each}.".startswith(f"{name}.")}
        imported = set().union(*(graph[each] for each in inside))
        other_ones = {other for other in found - {name} if any(f"{each}.".startswith(f"{other}.") for each in imported)}
        assert other_ones == set(), name


def test_scheduling_and_settings_do_without_torch() -> None:
    program = """
import sys
import amalgam.engine.request, amalgam.engine.blocks, amalgam.engine.scheduler, amalgam.config.reading, amalgam.errors
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_only_config_reads_the_environment() -> None:
    found: list[str] = []
    for module in MODULES:
        if module not in (PACKAGE / "config/environment.py", PACKAGE / "config/reading.py", ELSEWHERE):
            uses = [
                node
                for node in nodes(module)
                if (isinstance(node, ast.Attribute) and ast.unparse(node) in ENVIRONMENT)
                or ENVIRONMENT.intersection(imported_names(node))
            ]
            found += places(module, uses)
    assert found == []


def test_nothing_runs_code_from_data() -> None:
    found: list[str] = []
    for module in MODULES:
        for node in nodes(module):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                weights_only = any(
                    keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
                )
                if called in CODE_RUNNERS or (called.endswith("torch.load") and not weights_only):
                    found += places(module, [node])
            elif any(name.split(".")[0] in CODE_RUNNERS or name == "torch.load" for name in imported_names(node)):
                found += places(module, [node])
    assert found == []


def test_every_import_is_a_declared_dependency() -> None:
    allowed = {canonicalize_name(requirement.name) for requirement in declared()} | {"amalgam", "triton"}
    distributions = packages_distributions()
    undeclared: dict[str, list[str]] = {}
    for module in MODULES:
        if module == ELSEWHERE:
            continue
        optional = {canonicalize_name(item.name) for item in (extra(EXTRAS[module]) if module in EXTRAS else ())}
        for node in nodes(module):
            for name in (name.split(".")[0] for name in imported_names(node)):
                owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
                if name not in sys.stdlib_module_names and not owners & (allowed | optional):
                    undeclared.setdefault(name, []).extend(places(module, [node]))
    assert undeclared == {}


@pytest.mark.parametrize("name", ["", "dev", "docs"])
def test_every_dependency_is_pinned_within_its_bounds(name: str) -> None:
    pins = pinned(f"requirements-{name}.txt" if name else "requirements.txt")
    requirements = extra(name) if name else declared()
    wanted = {str(canonicalize_name(requirement.name)): requirement for requirement in requirements}
    assert pins.keys() == wanted.keys()
    for name, pin in pins.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert wanted[name].specifier.contains(specifier.version), f"{pin} is outside {wanted[name]}"


def test_errors_are_recognised_by_what_they_name() -> None:
    """`tests.errors.raises` with values, instead of a sentence that somebody may write better."""
    found: list[str] = []
    for module in TESTS:
        if not SENTENCE_LIKE.search(module.read_text(encoding="utf-8")):
            continue  # to parse them all takes seconds
        for node in nodes(module):
            if isinstance(node, ast.Call) and last_name(node.func) == "raises":
                found += places(module, [keyword.value for keyword in node.keywords if keyword.arg == "match"])
                found += places(module, [named for named in node.args[1:] if is_sentence(named)])
            elif isinstance(node, ast.Compare) and any(isinstance(each, ast.In) for each in node.ops):
                found += places(module, [text for text in node.comparators if is_text_of_an_error(text)])
    assert found == []


def test_tests_go_through_public_interfaces() -> None:
    """No `thing._member`, no import of a private name, none given as a text to `monkeypatch.setattr`."""
    found: list[str] = []
    for module in TESTS:
        if not PRIVATE_LIKE.search(module.read_text(encoding="utf-8")):
            continue
        for node in nodes(module):
            if isinstance(node, ast.Attribute):
                is_private = is_private_name(node.attr) and last_name(node.value) not in ("self", "cls", "super")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("amalgam"):
                is_private = any(is_private_name(alias.name) for alias in node.names)
            elif isinstance(node, ast.Call) and last_name(node.func) in ("setattr", "getattr", "delattr"):
                is_private = any(is_private_name(text.split(".")[-1]) for text in constants(node.args[:2]))
            else:
                continue
            found += [f"{module.relative_to(ROOT)}:{node.lineno}"] if is_private else []
    assert found == []


def last_name(node: ast.expr) -> str:
    """`c` of `a.b.c`, and of a call of it."""
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def constants(given: list[ast.expr]) -> list[str]:
    return [node.value for node in given if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def is_private_name(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in (EXTENSIONS | OF_OTHERS)


def is_sentence(node: ast.expr) -> bool:
    return any(re.fullmatch("[A-Z].* .*[a-z][.]", text) for text in constants([node]))


def is_text_of_an_error(node: ast.expr) -> bool:
    """`str(error.value)`, `str(last.error)`, and whatever else has such a name."""
    return re.match(r"str\(.*(err|value|caught|refus)", ast.unparse(node)) is not None


def test_the_long_tests_are_there() -> None:
    assert [name for name in LONG if name not in TOGETHER and not (ROOT / "tests" / name).exists()] == []
    assert [place for places in TOGETHER.values() for place in places if not list(ROOT.glob(f"tests/{place}*"))] == []


def test_links_in_the_documents_lead_somewhere() -> None:
    broken = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for match in LINK.finditer(document.read_text(encoding="utf-8")):
            target = (match[1] or match[2]).split("#")[0]
            if target and ":" not in target and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)} → {target}")
    assert broken == []


def test_files_and_names_in_the_architecture_are_there() -> None:
    """A file by its path in the package, or the end of that; `file::name` also has the name. X stands for a new one."""
    paths = [f"/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*")]
    missing = []
    for mentioned, name in FILE.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")):
        if mentioned.endswith("/X.h"):
            continue
        end = "/" + mentioned.rstrip("/")
        found = [PACKAGE / path[1:] for path in paths if path.endswith(end)] or [ROOT / mentioned]
        texts = (path.read_text(encoding="utf-8") for path in found if path.is_file())
        if not (any(re.search(rf"\b{name}\b", text) for text in texts) if name else any(map(Path.exists, found))):
            missing.append(f"{mentioned}::{name}".removesuffix("::"))
    assert missing == []


def test_every_document_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    documents = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert {name for name in documents if f"]({name}" not in readme} == set()
