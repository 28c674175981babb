"""`docs/configuration.md`, generated from the settings' own descriptions.

In: nothing. Out: Markdown. A test compares the file with it; `python -m amalgam.tools.reference` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from amalgam.config import NATIVE_ISA_VARIABLE, NATIVE_ISAS, Settings, environment_name, setting_keys

PATH = Path("docs/configuration.md")
_INTRODUCTION = f"""# Configuration

One YAML file (`--config`), environment variables and flags, in rising order of precedence. A flag is the key itself:
`--inference.max_seq_length 2048`; `--host`, `--port` and `--model` are short for `--server.host`, `--server.port` and
`--model.base_path`. `--source NAME=FOLDER` and `--map PATTERN=SOURCE` add a source and a rule. Unknown keys are errors.

Relative model paths in the file start at the file's folder. Every `<name>_path` under `mixed_precision` declares a
source called `<name>`; `base` is `base_path`. A pattern matches whole logical names: `*` any characters, `?` one,
`[abc]` one of them, `{{a,b}}` alternatives, `{{0-15}}` whole numbers. An exact name wins, then the pattern with more
literal characters, then the later rule, then `default_source`. `amalgam plan --explain NAME` says which and why.

`{NATIVE_ISA_VARIABLE}` ({", ".join(NATIVE_ISAS)}) makes the native kernels use a lower instruction set than the
processor has.
"""


def render() -> str:
    """The whole reference."""
    sections = [_INTRODUCTION]
    descriptions = setting_keys()
    for name, info in Settings.model_fields.items():
        rows = [
            f"## {name}",
            "",
            info.description or "",
            "",
            "| key | default | meaning | environment |",
            "|---|---|---|---|",
        ]
        for key, description in descriptions.items():
            if key.startswith(f"{name}."):
                default, description = _default(key), description.replace("|", "\\|")
                rows.append(f"| `{key}` | {default} | {description} | `{environment_name(key)}` |")
        sections.append("\n".join(rows) + "\n")
    return "\n".join(sections)


def _default(key: str) -> str:
    section: type[BaseModel] = Settings
    *parents, last = key.split(".")
    for parent in parents:
        annotation: Any = section.model_fields[parent].annotation
        section = annotation if isinstance(annotation, type) else get_args(annotation)[0]
    field = section.model_fields[last]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return (
        "–"
        if value is None or value in ("", (), {})
        else f"`{str(value).lower() if isinstance(value, bool) else value}`"
    )


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
