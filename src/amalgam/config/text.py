"""Text from outside → settings' values: YAML files, environment variables.

In: a file, or the environment as a mapping. Out: nested data in which scalars are still text; `settings` gives
each the type that its setting declares. Nothing is guessed from what a text looks like: `::` is an address, `2024` a
name, `010` ten and `1:30` an error. Must never know: which settings there are.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from amalgam.base.escaping import one_line
from amalgam.base.validation import kind_in_words
from amalgam.errors import ConfigError

ENV_PREFIX = "AMALGAM_"
MAX_CONFIG_BYTES = 16 * 2**20

# What Kubernetes, and Docker's links before it, set for each service that a process could call. A service `amalgam`
# gives AMALGAM_PORT=tcp://10.0.0.7:8080, and one `amalgam-server` the name of a setting, AMALGAM_SERVER_PORT.
_SERVICE = re.compile(r"AMALGAM(_\w+)?_SERVICE_(HOST|PORT(_\w+)?)", re.ASCII)
_SERVICE_PORT = re.compile(r"AMALGAM(_\w+)?_PORT(_\d+_(TCP|UDP|SCTP))?", re.ASCII)
_SERVICE_PORT_PART = re.compile(r"AMALGAM(_\w+)?_PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)", re.ASCII)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S*")

_MISSPELT = 0.85  # at least so alike are a setting's name and one that is meant to be it
_SIMILAR = 0.7

_QUOTED_WORD = re.compile(r"(['\"])(?!<)\S{2,}?\1")  # one character tells nothing, and <…> is a word of PyYAML's own

logger = logging.getLogger("amalgam.config")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping whose plain scalars are text, and None where they say null.

    Raises:
        ConfigError: the file is missing, too large, not YAML or no mapping, or holds a key twice.
    """
    if not path.exists():
        raise ConfigError(f"Configuration file {str(path)!r} does not exist.", remedy="Give its path with --config.")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise ConfigError(f"Configuration file {str(path)!r} is {kind}.", remedy="Give the path of a YAML file.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"Configuration file {str(path)!r} has more than {MAX_CONFIG_BYTES} bytes.")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"Configuration file {str(path)!r} cannot be read: {error.strerror}.", remedy="Check its permissions."
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"Configuration file {str(path)!r} is not valid YAML: {error}") from None
    if data is None:
        raise ConfigError(f"Configuration file {str(path)!r} is empty.", remedy="Expected a mapping.")
    if not isinstance(data, dict):
        raise ConfigError(f"Configuration file {str(path)!r} is {kind_in_words(data)}.", remedy="Expected a mapping.")
    return data


def parse_yaml(text: str) -> Any:
    """YAML whose plain scalars stay text, but for null.

    Raises:
        ValueError: it is not valid.
    """
    try:
        return yaml.load(text, Loader=_TextLoader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_told(error)) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None
    except (ValueError, LookupError, AttributeError):  # PyYAML's, of `!!int abc`, `!!bool abc` and `!!timestamp abc`
        raise ValueError("a value is none of its tag's") from None


def _told(error: yaml.MarkedYAMLError) -> str:
    """What is wrong and where, without words of the text: a key may stand there, such as `*key` or `!key`."""
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
    return _QUOTED_WORD.sub("…", error.problem or error.context or "it cannot be read") + place


class _TextLoader(yaml.SafeLoader):
    """SafeLoader that leaves types to the settings, and refuses duplicate keys.

    YAML 1.1 takes `no` for false, `010` for 8, `1:30` for 90 and `2024-01-01` for a date, whatever is asked for; and
    PyYAML merges duplicate keys silently, which YAML forbids.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {one_line(key_node.value)} stands twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_MERGE, _NULL = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"
_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (_MERGE, _NULL)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def our_variables(environ: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The variables among `environ` that are settings. Which others begin like ours, and are ignored, is logged.

    Args:
        names: of all settings, as variables.

    Raises:
        ConfigError: a name that is no setting's, but so much like one that it is meant to be it.
    """
    known = set(names)
    ours: dict[str, str] = {}
    of_services, unknown = [], []
    for name, text in sorted(environ.items()):
        if not name.startswith(ENV_PREFIX):
            continue
        if _is_of_a_service(name, text, name in known):
            of_services.append(name)
        elif name in known:
            ours[name] = text
        elif (meant := _nearest(name, known, _MISSPELT)) is not None:
            raise ConfigError(
                f"Environment variable {name} is not a setting.",
                remedy=f"Did you mean {meant}? `amalgam config` lists all; unset it if it is not for amalgam.",
            )
        else:
            similar = _nearest(name, known, _SIMILAR)
            unknown.append(name if similar is None else f"{name} (did you mean {similar}?)")
    if of_services:
        logger.warning("Ignored variables that an orchestrator sets for its services: %s.", ", ".join(of_services))
    if unknown:
        logger.warning("Ignored variables that are no settings: %s. `amalgam config` lists all.", ", ".join(unknown))
    return ours


def _is_of_a_service(name: str, text: str, is_setting: bool) -> bool:
    if _SERVICE_PORT.fullmatch(name) and _SERVICE_ADDRESS.fullmatch(text):
        return True
    return not is_setting and bool(_SERVICE.fullmatch(name) or _SERVICE_PORT_PART.fullmatch(name))


def _nearest(name: str, known: Iterable[str], cutoff: float) -> str | None:
    """The setting's name that is most alike; also one whose section has been left out, unless one word is all."""
    rest = name.removeprefix(ENV_PREFIX)
    by_rest = {other.removeprefix(ENV_PREFIX): other for other in sorted(known)}
    if "_" in rest:
        for key, other in by_rest.items():
            if key.endswith(f"_{rest}"):
                return other
    close = difflib.get_close_matches(rest, by_rest, n=1, cutoff=cutoff)
    return by_rest[close[0]] if close else None
