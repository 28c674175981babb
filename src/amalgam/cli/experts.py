"""`amalgam experts`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amalgam.cli.options import with_settings
from amalgam.cli.server import Server, address_of, no_server_of_ours
from amalgam.config.server import ServerSettings
from amalgam.config.settings import Settings
from amalgam.errors import CheckpointError, ConfigError, UnavailableError

if TYPE_CHECKING:
    import numpy.typing as npt

    from amalgam.composition.progress import Progress
    from amalgam.experts.saved.sets import SavedSet

_REFRESH_SECONDS = 2.0
_SERVER_SIDES = ("label", "minutes", "saved")
# What each kind of analysis takes; the last one, without a flag of its own, shows a server's statistics.
_TAKES = {
    "--prompt": {"--chat", "--max-new-tokens", "--layer", "--save", "--json"},
    "--compare": {"--url", "--json"},
    "--merge": {"--save"},
    "--save": {"--url"},
    "": {"--url", "--top-k", "--minutes", "--watch", "--json"},
}


@with_settings(needs_model=False, shown=("server.host", "server.port"))
def command(
    settings: Settings,
    url: Annotated[str | None, typer.Option(help="Address of the server. [default: from --host and --port]")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="How many of the busiest experts to list.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Only the last minutes, this many.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until interrupted.")] = False,
    prompt: Annotated[
        str | None, typer.Option(help="Analyse this text token by token, without a server (with --config or --model).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the chat template around --prompt.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Also generate this many tokens after --prompt, greedily.")
    ] = None,
    layer: Annotated[list[int], typer.Option(help="Show this layer of --prompt. Repeatable.")] = [],  # noqa: B006
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Compare two of: a saved set's file; the server's all, label:NAME, minutes:N, saved:NAME."),
    ] = None,
    merge: Annotated[list[Path], typer.Option(help="Add saved sets together (with --save). Repeatable.")] = [],  # noqa: B006
    save: Annotated[Path | None, typer.Option(help="Write a saved set (.safetensors or .npz).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show which experts are used: by a server's traffic, by one text, or in saved sets."""
    flags = {
        "--prompt": prompt,
        "--compare": compare,
        "--merge": merge or None,
        "--save": save,
        "--url": url,
        "--top-k": top_k,
        "--minutes": minutes,
        "--watch": watch or None,
        "--chat": chat or None,
        "--max-new-tokens": max_new_tokens,
        "--layer": layer or None,
        "--json": as_json or None,
    }
    _check_combination({flag for flag, value in flags.items() if value is not None})
    if save is not None:
        from amalgam.base.files import check_writable

        check_writable(save.expanduser())
    address = address_of(url, settings.server)
    if prompt is not None:
        _trace(settings, prompt, chat, max_new_tokens or 1, layer, save, as_json)
    elif compare is not None:
        _compare(address, *compare, as_json=as_json)
    elif merge:
        _merge(merge, save)
    elif save is not None:
        _save(_get_set(address, "experts/set.npz"), save)
    else:
        window = {} if minutes is None else {"minutes": minutes}
        _show(address, window | ({} if top_k is None else {"top_k": top_k}), watch, as_json)


def _check_combination(given: set[str]) -> None:
    """
    Raises:
        ConfigError: a flag would have no effect.
    """
    kinds = [kind for kind in _TAKES if kind in given]
    if "--save" in kinds and len(kinds) > 1:  # which is an analysis of its own only if there is no other
        kinds.remove("--save")
    if len(kinds) > 1:
        raise ConfigError(f"{' and '.join(kinds)} are given together.", remedy="Give one of them.")
    [kind] = kinds or [""]
    for flag in sorted(given - {kind} - _TAKES[kind]):
        owners = [owner or "a server's statistics" for owner, taken in _TAKES.items() if flag in taken]
        where = f"together with {kind}" if kind else "alone"
        raise ConfigError(f"{flag} is given {where}.", remedy=f"It goes with {' or '.join(owners)}.")
    for flag in ("--watch", "--layer"):  # JSON is printed once, and has all layers
        if {flag, "--json"} <= given:
            raise ConfigError(f"{flag} and --json are given together.", remedy="Give one of them.")


def _show(url: str, body: dict[str, Any], watch: bool, as_json: bool) -> None:
    from rich.live import Live

    from amalgam.cli.console import is_terminal, out, print_json
    from amalgam.cli.experts_view import page, screen

    if watch and not out.is_terminal:
        raise ConfigError("--watch needs a terminal.", remedy="Leave it out, or give --json.")
    server = Server(url)
    statistics = server.send("POST", "expert_stats", body)
    if as_json:
        print_json(statistics)
        return
    if not watch:
        is_whole = not is_terminal(sys.stdout)  # in a pipe nothing is left out for want of room
        out.print(page(statistics, out.width, None if is_whole else out.height))
        return
    with Live(console=out, screen=True, auto_refresh=False) as live:
        waiting = ""
        while True:
            live.update(screen(statistics, *out.size, waiting), refresh=True)
            time.sleep(_REFRESH_SECONDS)
            try:
                statistics, waiting = server.send("POST", "expert_stats", body), ""
            except UnavailableError as error:  # restarting, or loading; the figures stay until it answers
                waiting = f"Waiting for the server since it does not answer: {error.what}"


def _trace(
    settings: Settings,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    layers: list[int],
    save: Path | None,
    as_json: bool,
) -> None:
    from amalgam.cli.console import out, print_json, progress_bar
    from amalgam.cli.experts_view import print_trace
    from amalgam.runtime.opening import open_deployment
    from amalgam.tools.trace import trace_prompt

    if not settings.model.base_path:
        raise ConfigError("--prompt needs a model.", remedy="Give --config FILE or --model FOLDER.")
    with progress_bar() as progress:
        if layers:  # before the weights are read
            _check_layers(settings, layers, progress)
        deployment = open_deployment(settings, progress)
    try:
        trace = trace_prompt(deployment, prompt, as_chat=chat, max_new_tokens=max_new_tokens)
        if save is not None:
            assert deployment.statistics is not None
            _save(deployment.statistics.saved_set(), save)
    finally:
        deployment.close()
    if as_json:
        print_json(trace.as_json())
    else:
        print_trace(trace, layers, out.width)


def _check_layers(settings: Settings, layers: list[int], progress: Progress) -> None:
    import torch

    from amalgam.composition.loader import ModelLoader
    from amalgam.runtime.derive import ensure_derived

    ensure_derived(settings, progress)
    loader = ModelLoader(settings.model, settings.inference, torch.device("cpu"), settings.engine.num_load_threads)
    known = loader.spec.moe_layer_ids
    if unknown := set(layers).difference(known):
        raise ConfigError(f"--layer is {min(unknown)}.", remedy=f"Layers with experts: {list(known)}.")


def _compare(url: str, first: str, second: str, *, as_json: bool) -> None:
    from amalgam.cli.console import print_json
    from amalgam.cli.experts_view import print_comparison

    if _is_file(first) or _is_file(second):
        from amalgam.experts.comparison import compare

        (layer_ids, counts), (other_ids, other) = (_side(url, text) for text in (first, second))
        if (layer_ids, counts.shape) != (other_ids, other.shape):
            sizes = " and ".join(f"{item.shape[0]} layers of {item.shape[1]} experts" for item in (counts, other))
            raise ConfigError(
                f"{first!r} and {second!r} are of different models: {sizes}.", remedy="Compare one model."
            )
        answer = {"a": first, "b": second, "layer_ids": layer_ids, **compare(counts, other)}
    else:
        answer = Server(url).get("experts/compare", {"a": first, "b": second})
    if as_json:
        print_json(answer)
    else:
        print_comparison(answer)


def _is_file(text: str) -> bool:
    """Whether one side of --compare is a file rather than something that the server has."""
    return text != "all" and text.partition(":")[0] not in _SERVER_SIDES


def _side(url: str, text: str) -> tuple[list[int], npt.NDArray[Any]]:
    """Layers, and activations [layers, experts]: of a file, or of the server to be compared with one."""
    import numpy as np

    from amalgam.experts.saved.files import load

    if _is_file(text):
        saved = load(Path(text).expanduser())
        return list(saved.layer_ids), saved.total.counts.sum(axis=0)
    kind, _, name = text.partition(":")
    if kind == "saved":
        raise ConfigError(
            f"{text!r} is a set of the server, which is compared there, and not with files.",
            remedy="Give its file, which lies in the server's export folder.",
        )
    grid = Server(url).get("experts/grid", {} if kind == "all" else {kind: name})
    counts = np.array(grid["values"], np.int64).reshape(len(grid["layer_ids"]), grid["num_experts"])
    return grid["layer_ids"], counts


def _merge(paths: list[Path], save: Path | None) -> None:
    from amalgam.experts.saved.files import load
    from amalgam.experts.saved.sets import merge

    if save is None:
        raise ConfigError("--merge has nowhere to write to.", remedy="Give --save FILE.safetensors.")
    _save(merge([load(path.expanduser()) for path in paths]), save)


def _save(saved: SavedSet, path: Path) -> None:
    from amalgam.base.files import writing
    from amalgam.base.sizes import human_bytes
    from amalgam.cli.console import note
    from amalgam.experts.saved.files import save

    target = path.expanduser()
    with writing(target):
        save(saved, target)
        num_bytes = target.stat().st_size
    note(f"Saved {path} ({human_bytes(num_bytes)}).")


def _get_set(url: str, path: str) -> SavedSet:
    from amalgam.experts.saved.files import from_bytes

    content = Server(url).read(path)
    try:
        return from_bytes(content, url)
    except CheckpointError:
        raise no_server_of_ours(url) from None


def saved_set_of(url: str) -> SavedSet:
    """What a running server has counted since its last reset.

    Raises:
        ConfigError: it is no address.
        UnavailableError: no server of ours answers there.
    """
    return _get_set(address_of(url, ServerSettings()), "experts/set.npz")
