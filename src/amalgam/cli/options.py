"""Flags that several verbs share: every setting as `--section.field`, and the everyday ones by short names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from amalgam.base.heap import share_one_heap
from amalgam.cli.rules import read_rule
from amalgam.config.environment import let_threads_sleep
from amalgam.config.keys import SettingInfo, all_settings
from amalgam.config.reading import read_settings
from amalgam.errors import ConfigError

SHORT = {
    "model.base_path": "--model", "server.api_keys": "--api-key", "server.host": "--host",
    "server.metrics_compat": "--metrics-compat", "server.port": "--port", "server.root_path": "--root-path",
    "speculation.draft": "--draft", "speculation.kind": "--speculation",
}  # fmt: skip
# What vLLM's and llama-server's users type for the same, where a value means the same too.
OTHERS: Mapping[str, tuple[str, ...]] = {
    "engine.block_size": ("--block-size",),
    "engine.kv_cache_bytes": ("--kv-cache-memory-bytes",),
    "engine.kv_dtype": ("--kv-cache-dtype",),
    "engine.load_threads": ("--max-parallel-loading-workers",),
    "engine.max_step_tokens": ("--max-num-batched-tokens", "--batch-size"),
    "engine.num_threads": ("--threads",),
    "inference.dtype": ("--dtype",),
    "inference.max_batch_size": ("--max-num-seqs", "--parallel"),
    "inference.max_seq_length": ("--max-model-len", "--ctx-size"),
    "server.allowed_origins": ("--allowed-origins", "--cors-origins"),
    "server.api_keys_file": ("--api-key-file",),
    "server.chat_template": ("--chat-template", "--chat-template-file"),
    "server.drain_seconds": ("--shutdown-timeout",),
    "server.embedding_pooling": ("--pooling",),
    "server.max_header_bytes": ("--h11-max-incomplete-event-size",),
    "server.max_workers": ("--threads-http",),
    "server.otlp_endpoint": ("--otlp-traces-endpoint",),
    "server.reasoning_parser": ("--reasoning-parser",),
    "server.root_path": ("--api-prefix",),
    "server.served_model_names": ("--served-model-name", "--alias"),
    "server.stream_comment_seconds": ("--sse-ping-interval",),
    "server.tls_cert": ("--ssl-certfile", "--ssl-cert-file"),
    "server.tls_key": ("--ssl-keyfile", "--ssl-key-file"),
    "server.tool_parser": ("--tool-call-parser",),
    "server.unix_socket": ("--uds",),
    "speculation.draft": ("--model-draft", "--spec-draft-model"),
    "speculation.num_tokens": ("--spec-draft-n-max",),
}
_GIVEN = {"settings", "origins", "config_file", "read_again"}  # parameters of a verb that are no flags of its own
SETTINGS_NOTE = "Every setting is a flag too, such as --inference.max_seq_length 2048: `amalgam config` lists them."


def with_settings(
    function: Callable[..., Any] | None = None,
    *,
    needs_model: bool = True,
    shown: Collection[str] = (),
    takes_others: bool = False,
) -> Callable[..., Any]:
    """Give a verb `--config`, `--source`, `--map`, `--device` and a flag for every setting; it receives `settings`.

    One that has a parameter `origins` also receives where each setting that was given comes from, one that has
    `config_file` the file that was named, or None, and one that has `read_again` a function that reads the same anew.

    Args:
        needs_model: False for a verb that can do without; it sees an empty `model.base_path` when none is given, but a
            configuration file has to have one.
        shown: settings, beside the model, that its help lists. `amalgam config` lists all.
        takes_others: whether flags may have the names that other servers give them.
    """
    if function is None:
        return functools.partial(with_settings, needs_model=needs_model, shown=shown, takes_others=takes_others)
    # Mappings have no flag of their own: --source, --map and --device build them.
    flags = {info.key.replace(".", "_"): info for info in all_settings() if not info.is_structured}
    own = [p for p in inspect.signature(function).parameters.values() if p.name not in _GIVEN]
    wanted = _GIVEN & inspect.signature(function).parameters.keys()

    @functools.wraps(function)
    def wrapper(**arguments: Any) -> Any:
        config: Path | None = arguments.pop("config")
        texts = {name: text for name in flags if (text := arguments.pop(name)) is not None}
        read_all = functools.partial(
            read_settings,
            config,
            {flags[name].key: flags[name].read(text) for name, text in texts.items()},
            sources=dict(_source(item) for item in arguments.pop("source")),
            rules=[read_rule(item) for item in arguments.pop("map_")],
            devices=dict(_device(item) for item in arguments.pop("device")),
            needs_model=needs_model or config is not None,
        )
        read = read_all()
        found = {
            "settings": read.settings,
            "origins": read.origins,
            "config_file": config,
            "read_again": lambda: read_all().settings,
        }
        share_one_heap()
        let_threads_sleep()  # verbs load PyTorch when they need it, which is later
        return function(**{name: found[name] for name in wanted}, **arguments)

    hints: dict[str, Any] = {
        "config": Annotated[Path | None, typer.Option("--config", "-c", help="Configuration file (YAML).")],
        "source": Annotated[list[str], typer.Option("--source", help="Declare a source: NAME=FOLDER. Repeatable.")],
        "map_": Annotated[
            list[str],
            typer.Option(
                "--map", help="Add a rule: PATTERN=SOURCE, PATTERN=@DEVICE or PATTERN=SOURCE@DEVICE. Repeatable."
            ),
        ],
        "device": Annotated[
            list[str],
            typer.Option("--device", help="Name a device that experts may lie on, its memory if limited: cuda=24GB."),
        ],
    }
    defaults: dict[str, Any] = {"config": None, "source": [], "map_": [], "device": []}
    for name, info in flags.items():
        is_shown = info.key in ("model.base_path", *shown)
        hints[name] = Annotated[str | None, _option(info, OTHERS.get(info.key, ()) if takes_others else (), is_shown)]
        defaults[name] = None
    own_hints = get_type_hints(function, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(annotation=own_hints[p.name]) for p in own if p.kind is not keyword]
        + [p.replace(annotation=own_hints[p.name]) for p in own if p.kind is keyword]
        + [inspect.Parameter(n, keyword, default=defaults[n], annotation=hint) for n, hint in hints.items()]
    )
    wrapper.__annotations__ = {**{p.name: own_hints[p.name] for p in own}, **hints}
    wrapper.epilog = SETTINGS_NOTE  # type: ignore[attr-defined]
    return wrapper


def _option(info: SettingInfo, others: Collection[str], is_shown: bool) -> Any:
    names = [*([SHORT[info.key]] if info.key in SHORT else []), f"--{info.key}", *others]
    help_text = f"{info.description} [{info.environment}]"
    return typer.Option(*names, help=help_text, hidden=not is_shown, metavar=_metavar(info))


def _metavar(info: SettingInfo) -> str:
    """`float32|bfloat16|float16` for a setting that takes one of several words, else its type: `INTEGER`."""
    kind = info.kind.removesuffix(" or none")
    return kind.replace(" | ", "|") if " | " in kind else kind.split()[0].upper()


def _source(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"--source is {text!r}.", remedy="Expected NAME=FOLDER or NAME=hub-id.")
    return name, path


def _device(text: str) -> tuple[str, str]:
    name, _, memory = text.partition("=")
    return name, memory


def refuse_unused(given: Mapping[str, Any], partner: str, remedy: str) -> None:
    """
    Args:
        given: flags that have no effect without `partner`; what is true was given.

    Raises:
        ConfigError: naming the first one.
    """
    for flag, value in given.items():
        if value:
            raise ConfigError(f"{flag} is given without {partner}.", remedy=remedy)
