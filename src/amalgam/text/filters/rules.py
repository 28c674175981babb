"""Settings → rules: what is looked for, made ready once and shared by all texts.

In: `FiltersSettings`. Out: `Rule`s. Must never know: requests, HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from amalgam.base.plugins import load_plugins_named
from amalgam.config.filters import FilterRule, FiltersSettings
from amalgam.errors import ConfigError, describe
from amalgam.text.filters import syntax
from amalgam.text.filters.automaton import Automaton, Scanner, Tag
from amalgam.text.filters.contract import GROUP, Action, Hook, HookFactory, Where
from amalgam.text.filters.folding import Folding
from amalgam.text.filters.personal import LOOKS

MAX_WORDS = 200_000
MAX_FILE_BYTES = 16 * 2**20
REMOVED = "REMOVED"


@dataclass(frozen=True, eq=False)
class Rule:
    """One rule, ready for use.

    Attributes:
        automaton, hook: one of them finds.
        folding: what the text's characters become before the automaton sees them.
        replacement: None: the label of what was found, in brackets.
    """

    name: str
    where: frozenset[Where]
    action: Action
    replacement: str | None
    max_chars: int
    folding: Folding
    automaton: Automaton | None = None
    hook: Hook | None = None

    def scanner(self, *, is_eager: bool) -> Scanner:
        assert self.automaton is not None
        return Scanner(self.automaton, self.max_chars, is_eager=is_eager)

    def replaced(self, label: str, replacement: str | None = None) -> str:
        """What stands in the place of something found."""
        if replacement is not None:
            return replacement
        return f"[{label}]" if self.replacement is None else self.replacement


def make_rules(settings: FiltersSettings) -> tuple[Rule, ...]:
    """
    Raises:
        ConfigError: a pattern, a file or a hook cannot be used; the message names the rule.
    """
    hooks: Mapping[str, HookFactory] = {}
    if any(rule.hook for rule in settings.rules):
        hooks = load_plugins_named(GROUP)
    return tuple(_made(rule, hooks) for rule in settings.rules)


def _made(rule: FilterRule, hooks: Mapping[str, HookFactory]) -> Rule:
    folding = Folding(rule.unicode, ignores_case=bool(rule.words or rule.words_file) and not rule.case_sensitive)
    replacement = rule.replacement if rule.action == "replace" else None
    common = (rule.name, rule.places, rule.action, replacement)
    try:
        if rule.hook:
            hook = _hook(rule, hooks)
            return Rule(*common, hook.max_chars, folding, hook=hook)
        return Rule(*common, rule.max_chars, folding, automaton=_automaton(rule, folding))
    except ConfigError as error:
        raise ConfigError(f"filters.rules: {rule.name}: {error.what}", remedy=error.remedy) from error


def _hook(rule: FilterRule, hooks: Mapping[str, HookFactory]) -> Hook:
    if rule.hook not in hooks:
        offered = ", ".join(sorted(hooks)) or "none"
        raise ConfigError(
            f"No installed package offers the hook {describe(rule.hook)}.",
            remedy=f"There are, as entry points of {GROUP}: {offered}.",
        )
    try:
        hook = hooks[rule.hook](rule.options.get_secret_value())
    except ConfigError:
        raise
    except Exception as error:  # somebody else's code, which is given what a user wrote
        raise ConfigError(
            f"The hook {describe(rule.hook)} cannot be made ({type(error).__name__}: {error}).",
            remedy="See what options it takes.",
        ) from error
    max_chars = getattr(hook, "max_chars", None)
    if not callable(getattr(hook, "find", None)) or type(max_chars) is not int or max_chars < 1:
        raise ConfigError(
            f"The hook {describe(rule.hook)} gives {describe(hook)}.",
            remedy="Expected an object with find and max_chars, an integer from 1.",
        )
    return hook


def _automaton(rule: FilterRule, folding: Folding) -> Automaton:
    words = [(_folded(word, rule, folding), Tag(REMOVED)) for word in (*rule.words, *_words_of(rule.words_file))]
    if len(words) > MAX_WORDS:
        raise ConfigError(f"There are {len(words)} words.", remedy=f"Allowed: {MAX_WORDS}.")
    ignores_case = not rule.case_sensitive
    nodes = [(syntax.parse(text, folding.of, ignores_case=ignores_case), Tag(REMOVED)) for text in rule.regexes]
    for kind in rule.pii:
        nodes += [(syntax.parse(look.pattern), Tag(kind.upper(), look.check)) for look in LOOKS[kind]]
    size = sum(syntax.num_nodes(node) for node, _ in nodes)
    if size > syntax.MAX_NODES:
        raise ConfigError(f"The patterns have {size} parts in all.", remedy=f"Allowed: {syntax.MAX_NODES}.")
    return Automaton(words, nodes, borders=rule.whole_words)


def _folded(word: str, rule: FilterRule, folding: Folding) -> str:
    folded = folding.of(word)
    if not folded.strip():
        raise ConfigError(f"The word {describe(word)} has nothing that is shown.", remedy="Leave it out.")
    if len(folded) > rule.max_chars:
        raise ConfigError(
            f"A word has {len(folded)} characters, {describe(word, 40)}.",
            remedy=f"max_chars, {rule.max_chars}, is the longest that is held back: raise it.",
        )
    return folded


def _words_of(path: str) -> list[str]:
    """A word a line; empty lines, and those that begin with #, are none."""
    if not path:
        return []
    try:
        file = Path(path)
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path!r} has more than {MAX_FILE_BYTES} bytes.", remedy="Give a shorter list.")
        text = file.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be read ({error.strerror}).", remedy="Give a file of words.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path!r} is not UTF-8.", remedy="Give a text file, a word a line.") from None
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
