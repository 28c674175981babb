"""Settings of what may not pass in prompts, answers and logs: section `filters`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Secret, StringConstraints, field_validator, model_validator

from amalgam.config.fields import Section, UserPath

FilterKind = Literal["pii", "words", "regexes", "hook"]


class FilterRule(Section):
    """One filter: what it looks for (`pii`, `words`, `regexes` or a `hook`), where, and what is done about it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    """What it is called in metrics, errors and `GET /filters`."""
    where: tuple[Literal["prompts", "answers", "logs"], ...] = ("prompts", "answers")
    """Texts that it looks at. What may not be in prompts may not be in logs, unless a hook finds it; there it is always
    redacted.
    """
    action: Literal["block", "redact", "replace"] = "redact"
    """block: the prompt is refused, the answer ends before it. redact: `[EMAIL]` in its place. replace: `replacement`.
    """
    replacement: str = Field(default="", max_length=256)
    """What stands in the place of what was found (replace)."""
    pii: tuple[Literal["email", "phone", "id_card", "bank_card", "ip", "api_key"], ...] = ()
    """Kinds of personal data and secrets."""
    words: tuple[Annotated[str, StringConstraints(min_length=1, max_length=1024)], ...] = ()
    """Words and phrases."""
    words_file: UserPath = ""
    """More of them: a file in UTF-8 with one a line; lines that begin with # are comments."""
    regexes: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = ()
    """Regular expressions, matched in time linear in the text: no references, looking around or anchors."""
    hook: str = ""
    """A hook that an installed package offers as an entry point of `amalgam.filters`."""
    options: Secret[dict[str, Any]] = Secret({})
    """What the hook is made with: the token of a service, perhaps, so that it is not shown."""
    case_sensitive: bool = False
    """Whether words and regular expressions tell `A` from `a`."""
    whole_words: bool = True
    """Whether words are found only without a letter or digit beside them, where their script has borders (not Chinese).
    """
    unicode: Literal["none", "nfkc", "loose"] = "nfkc"
    """nfkc: one spelling for equivalent characters, none for invisible ones. loose: and without accents. none: as is.
    """
    max_chars: int = Field(default=256, ge=1, le=65536)
    """The longest match of a regular expression that a stream is held back for, and the longest word."""

    @model_validator(mode="after")
    def _check_kind(self) -> FilterRule:
        kinds = self._kinds
        if len(kinds) != 1:
            found = " and ".join(kinds) or "nothing"
            raise ValueError(f"rule {self.name!r} looks for {found}: give one of pii, words, regexes and hook")
        if not self.where:
            raise ValueError(f"rule {self.name!r} looks nowhere: name prompts, answers or logs in where")
        if self.hook and "logs" in self.where:
            raise ValueError(f"rule {self.name!r} is a hook, which cannot look at logs: leave them out of where")
        if self.options.get_secret_value() and not self.hook:
            raise ValueError(f"rule {self.name!r} has options and no hook")
        if (self.action == "replace") != bool(self.replacement):
            raise ValueError(f"rule {self.name!r} needs a replacement with action replace, and only there")
        return self

    @property
    def kind(self) -> FilterKind:
        """What it looks for."""
        return self._kinds[0]

    @property
    def places(self) -> frozenset[Literal["prompts", "answers", "logs"]]:
        """Texts that it looks at: the log holds prompts, which whoever keeps them clean wants clean there, too."""
        return frozenset((*self.where, "logs") if "prompts" in self.where and not self.hook else self.where)

    @property
    def _kinds(self) -> list[FilterKind]:
        given: dict[FilterKind, Any] = {
            "pii": self.pii, "words": self.words or self.words_file, "regexes": self.regexes, "hook": self.hook,
        }  # fmt: skip
        return [name for name, value in given.items() if value]


class FiltersSettings(Section):
    """What may not pass in prompts, answers and logs."""

    rules: tuple[FilterRule, ...] = ()
    """The filters, each with a name. Nobody can pass them by."""
    blocked_prompt: Literal["error", "refusal"] = "error"
    """What a blocked prompt is answered with: error 400 `content_filtered`, or an answer that is `refusal`."""
    refusal: str = Field(default="I cannot help with that.", min_length=1, max_length=4096)
    """The answer to a blocked prompt, where that is no error."""
    hook_seconds: float = Field(default=2.0, gt=0, le=600)
    """How long a hook may take for one text; then the request ends with an error that names it."""
    hook_threads: int = Field(default=4, ge=1, le=64)
    """Most calls of one hook at a time."""

    @field_validator("rules", mode="after")
    @classmethod
    def _check_names(cls, value: tuple[FilterRule, ...]) -> tuple[FilterRule, ...]:
        names = [rule.name for rule in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules are called {name!r}")
        return value
