"""Every setting by its dotted key: what it takes, what it says of itself, and the variable that sets it.

In: the models of the sections. Out: one `SettingInfo` each, of which flags, variables and the reference are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from amalgam.config.explaining import shown
from amalgam.config.fields import Section, kind_of, split_list, types_of
from amalgam.config.settings import Settings
from amalgam.config.text import ENV_PREFIX, parse_yaml
from amalgam.errors import ConfigError


@dataclass(frozen=True)
class SettingInfo:
    """What there is to say about one setting.

    Attributes:
        kind: what it takes, in words.
        default: None if there is none, or if that is the default.
    """

    key: str
    kind: str
    is_required: bool
    default: Any
    description: str
    field: FieldInfo

    @property
    def environment(self) -> str:
        return environment_name(self.key)

    @property
    def is_structured(self) -> bool:
        """A mapping, or a list of them; flags build it piece by piece."""
        return any(get_origin(kind) is dict or _holds_sections(kind) for kind in types_of(self.field))

    def read(self, text: str) -> Any:
        """What a variable or a flag says: text as it is, but for lists and mappings.

        Raises:
            ConfigError: a list or mapping that is neither JSON nor YAML.
        """
        if any(get_origin(kind) in (dict, tuple) for kind in types_of(self.field)):
            if not self.is_structured:
                return split_list(text)
            try:
                return parse_yaml(text)
            except ValueError as error:
                raise ConfigError(
                    f"{self.key} is {shown(text, self.field.rebuild_annotation())}, which is not valid: {error}",
                    remedy="Write it as JSON or YAML.",
                ) from None
        return text


def all_settings() -> tuple[SettingInfo, ...]:
    """Every setting, section by section; the source of flags, environment names and the reference."""
    found: list[SettingInfo] = []

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation, f"{prefix}{name}.")
                continue
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            found.append(
                SettingInfo(prefix + name, kind_of(field), field.is_required(), default, field.description or "", field)
            )

    walk(Settings, "")
    return tuple(found)


def setting_keys() -> dict[str, str]:
    """Every setting as dotted key → description."""
    return {info.key: info.description for info in all_settings()}


def environment_name(key: str) -> str:
    """`server.max_workers` → `AMALGAM_SERVER_MAX_WORKERS`."""
    return ENV_PREFIX + key.replace(".", "_").upper()


def _holds_sections(kind: Any) -> bool:
    return any(isinstance(part, type) and issubclass(part, Section) for part in get_args(kind))
