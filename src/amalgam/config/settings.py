"""Every setting, as frozen pydantic models.

In: a nested mapping. Out: one immutable `Settings`. The command line's flags, `amalgam config` and
`docs/configuration.md` are generated from the fields here (`keys.py`). Must never know: files, the environment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from amalgam.base.processors import usable_threads
from amalgam.config.cluster import ClusterSettings
from amalgam.config.devices import DeviceName, MemorySize, device_name
from amalgam.config.explaining import explain
from amalgam.config.fields import Address, ModelPath, Section, UserPath, split_list
from amalgam.config.filters import FiltersSettings
from amalgam.config.names import MAX_KEPT, WeightsName
from amalgam.errors import ConfigError

BASE_SOURCE = "base"
PATH_SUFFIX = "_path"
_SOURCE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"

SourceName = Annotated[str, StringConstraints(pattern=_SOURCE_NAME)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
HostName = Annotated[str, StringConstraints(pattern=r"^(\*|(\*\.)?[a-z0-9_.-]+|\[?[0-9a-f:.]+\]?)$", to_lower=True)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/\s?#]+)$", to_lower=True)]


class Placement(Section):
    """Which source weights come from, and on which device they lie: one of them, or both.

    What is left out stays as it is without: by the next weaker rule that says it, else the default source and the
    device of `inference.device_map`.
    """

    source: str | None = Field(default=None, pattern=_SOURCE_NAME)
    """The source that matching weights come from."""
    device: DeviceName | None = None
    """The device that matching weights of experts lie on: `cpu`, `cuda`, `cuda:N`, or one of inference.devices."""

    @model_validator(mode="after")
    def _check_not_empty(self) -> Placement:
        if self.source is None and self.device is None:
            raise ValueError("neither a source nor a device is given. Expected a source's name, or {source, device}")
        return self

    def over(self, earlier: Placement | None) -> Placement:
        """What holds if both are said, one after the other."""
        if earlier is None:
            return Placement(source=self.source, device=self.device)
        return Placement(source=self.source or earlier.source, device=self.device or earlier.device)

    @model_serializer(mode="plain")
    def _as_written(self) -> Any:
        """As short as people write it."""
        return self.source if self.device is None else {k: v for k, v in dict(self).items() if v is not None}


class Rule(Placement):
    """One rule of the weight mapping."""

    pattern: Pattern
    """Logical weight name, or a pattern: `*`, `?`, `[abc]`, `{a,b}` and `{0-15}`."""

    @model_serializer(mode="plain")
    def _as_written(self) -> Any:
        found = {"pattern": self.pattern, "source": self.source, "device": self.device}
        return {key: value for key, value in found.items() if value is not None}


def source_alone(value: Any) -> Any:
    """A placement as a mapping of its fields; a text is a source's name."""
    if isinstance(value, str):
        return {"source": value}
    if not isinstance(value, Mapping | Placement):
        raise ValueError("it is no placement. Expected a source's name, or {source, device}")
    return value


PlacementValue = Annotated[Placement, BeforeValidator(source_alone)]
"""A source's name, or a `Placement`."""
PlacementLike = str | Placement | Mapping[str, Any]
"""The same, as callers give it."""


class DerivedSource(Section):
    """How to make a source that does not exist yet: quantize the base checkpoint into the source's folder."""

    format: Literal["fp8", "int8", "int4"]
    """Precision of the linear weights."""
    group_size: int | None = Field(default=None, ge=1, le=65536)
    """Inputs that share a scale (int4). None: 128, or the largest power of two below it that divides the inputs."""
    scale: Literal["tensor", "channel", "block"] | None = None
    """Granularity of the scales (fp8: tensor, channel or block of 128×128; int8: channel)."""


class MixedPrecisionSettings(Section):
    """Where each weight comes from. Every `<name>_path` key declares a source called `<name>`."""

    sources: dict[SourceName, ModelPath] = Field(default_factory=dict)
    """Name → folder or hub id, for sources whose names do not fit a `<name>_path` key."""
    weight_mapping: dict[str, PlacementValue] = Field(default_factory=dict)
    """Logical name or pattern → source, or `{source: fp8, device: cuda}`, either of which may be left out. Exact names
    win, then the most specific pattern."""
    rules: tuple[Rule, ...] = ()
    """The same as an ordered list: among equally specific patterns the later wins."""
    default_source: SourceName = BASE_SOURCE
    """Source of weights that no rule names."""
    derived: dict[SourceName, DerivedSource] = Field(default_factory=dict)
    """Sources to make from `base_path` at first use when their folder is absent and no other process is making it."""

    @model_validator(mode="before")
    @classmethod
    def _collect_paths(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        result: dict[str, Any] = {}
        sources: dict[str, Any] = dict(data.get("sources") or {})
        for key, value in data.items():
            if isinstance(key, str) and key.endswith(PATH_SUFFIX) and key not in cls.model_fields:
                name = key.removesuffix(PATH_SUFFIX)
                if name in sources:
                    raise ValueError(f"source {name!r} is declared twice, as {key} and in sources")
                sources[name] = value
            else:
                result[key] = value
        if BASE_SOURCE in sources:
            raise ValueError(f"source name {BASE_SOURCE!r} is taken by model.base_path")
        result["sources"] = sources
        return result

    @model_validator(mode="after")
    def _check_sources(self) -> MixedPrecisionSettings:
        known = {BASE_SOURCE, *self.sources}
        used = [(f"weight_mapping[{name!r}]", placement.source) for name, placement in self.weight_mapping.items()]
        used += [(f"rules[{i}] ({rule.pattern!r})", rule.source) for i, rule in enumerate(self.rules)]
        used += [("default_source", self.default_source), *((f"derived[{name!r}]", name) for name in self.derived)]
        for where, source in used:
            if source is not None and source not in known:
                raise ValueError(
                    f"{where} names source {source!r}, which is not declared. Declared: "
                    f"{', '.join(sorted(known))}. Add {source}{PATH_SUFFIX} or correct the name"
                )
        return self

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """`weight_mapping` and `rules` as one ordered list."""
        return (*build_rules(self.weight_mapping), *self.rules)


class ModelSettings(Section):
    """The model and its checkpoints."""

    name: str = ""
    """Name shown to clients. Empty: the folder's name."""
    base_path: ModelPath
    """Folder, `.gguf` file or hub id (`org/name`, `org/name:file.gguf`): configuration, tokenizer, default weights."""
    mixed_precision: MixedPrecisionSettings = MixedPrecisionSettings()
    """Further sources and the rules that choose among them."""


class InferenceSettings(Section):
    """How the model runs."""

    max_seq_length: int = Field(default=4096, ge=1, le=2**24)
    """Most tokens in one sequence, prompt and answer together."""
    max_batch_size: int = Field(default=32, ge=1, le=4096)
    """Most sequences in one step."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of activations, and of the KV cache unless engine.kv_dtype names another one."""
    activation: Literal["auto", "int8", "bf16"] = "auto"
    """What bfloat16 activations become for integer weights on the CPU. auto: int8, bf16 for small dense models."""
    bf16_coding: bool = True
    """Whether a CPU with AVX2 or AVX-512 keeps bf16 weights in 12 bits, without loss: less to read, longer to load."""
    device_map: str = "auto"
    """auto | cpu | cuda | cuda:N, and cpu:N, which stands in for a card: the device that computes all but experts which
    rules place elsewhere."""
    devices: dict[DeviceName, MemorySize | None] = Field(default_factory=dict)
    """Device → memory that weights may take there, such as `cuda: 24GB`; empty: what is free. A stand-in for a card
    (`cpu:1`) is there only if it is named here or in device_map."""
    load_in_8bit: bool = False
    """Quantize wide linear weights that no rule names to int8 while loading."""
    load_in_4bit: bool = False
    """The same to int4 in groups of 128."""
    packed_cache: UserPath = ""
    """Folder that keeps packed weights, so that later starts map them and need not read and pack. Empty: none."""

    @field_validator("device_map")
    @classmethod
    def _check_device_map(cls, value: str) -> str:
        return value if value == "auto" else device_name(value)

    @model_validator(mode="after")
    def _check_one_width(self) -> InferenceSettings:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit are both true: choose one")
        return self


class EngineSettings(Section):
    """The step loop and the KV cache."""

    max_step_tokens: int = Field(default=512, ge=1, le=2**20)
    """Most tokens in one step; longer prompts are computed in chunks."""
    max_slowdown: float = Field(default=2.0, gt=1, le=1000)
    """How many times as long a step may take that computes prompts beside streams. Fewer prompt tokens keep it so."""
    block_size: int = Field(default=16, ge=1, le=1024)
    """Tokens in one KV block."""
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"] = "auto"
    """Type of the KV cache. auto: inference.dtype. int8, fp8 (E4M3): with a scale for each token and head."""
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    """Size of the KV cache. None: room for max_batch_size sequences of max_seq_length, within a quarter of memory."""
    state_cache_bytes: int | None = Field(default=None, ge=1)
    """Size of recurrent states (see support.md). None: two for each of max_batch_size, within an eighth of memory."""
    prefix_cache: bool = True
    """Whether a request uses keys and values that are there already for its beginning. Changes no answer."""
    max_queue: int = Field(default=1024, ge=1, le=2**20)
    """Most requests that wait beside the inference.max_batch_size that may run; more are refused with 503."""
    rollback_answers: int = Field(default=8, ge=0, le=2**20)
    """New weights that fail (NaN, an exception) before so many answers are left for those before. 0: they stay."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """Compute threads. None: one for each core that affinity and the cgroup's quota allow, at most OMP_NUM_THREADS."""
    pin_threads: bool = False
    """Whether each compute thread stays on a core of its own. For machines that compute nothing else."""
    numa: Literal["off", "interleaved", "local"] = "off"
    """Packed weights on several memory nodes: off (anywhere), interleaved by pages, local to the threads that read."""
    load_threads: int | None = Field(default=None, ge=1, le=256)
    """Threads that read and pack weights. None: as many as cores are allowed, from 4 to 32."""

    @property
    def num_load_threads(self) -> int:
        return self.load_threads or min(max(usable_threads(), 4), 32)


class ServerSettings(Section):
    """The HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port to listen on; 0 lets the system choose."""
    max_workers: int = Field(default=4, ge=1, le=256)
    """Threads for tokenizing and file reading."""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    """Largest request body; more is refused with 413."""
    max_batch_prompts: int = Field(default=256, ge=1, le=65536)
    """Most prompts in one /batch_generate, and most chunks in one /summarize."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """How long requests in flight may run on after SIGTERM."""
    log_probes: bool = True
    """Whether the access log has lines for /health, /ready and /metrics."""
    keep_alive_seconds: float = Field(default=75.0, gt=0, le=86400)
    """How long a connection may be idle, or take to send a request's head. Longer than a proxy in front keeps it."""
    stream_comment_seconds: float = Field(default=5.0, ge=0, le=86400)
    """While a streamed request waits, a comment is sent so often, since proxies end idle connections. 0: never."""
    accept_backlog: int = Field(default=16, ge=1, le=4096)
    """Most connections taken at once before others get their turn."""
    allowed_hosts: tuple[HostName, ...] = ()
    """Names, without ports, that a Host header may have beside this machine's. `*.a.org`: all below; `*`: any."""
    allowed_origins: tuple[Origin, ...] = ()
    """Whose web pages may use the server, beside its own: `https://name:port`; `*`: anybody's."""

    export_dir: UserPath = "expert_stats"
    """Folder that /export_expert_stats writes to."""
    root_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~!$&'()*+,;=:@-]+)*$")
    """Where a proxy shows the server: `/llm`. Whether the proxy takes it away does not matter."""
    unix_socket: UserPath = ""
    """File of a Unix socket to listen on, in place of host and port. Empty: none."""
    unix_socket_mode: str = Field(default="660", pattern=r"^[0-7]{3}$")
    """Permissions of that file, in octal digits: whoever may write to it may connect."""
    tls_cert: UserPath = ""
    """Certificate and those that it is signed by, in PEM, for https. Read again at SIGHUP. Empty: http."""
    tls_key: UserPath = ""
    """The certificate's private key, in PEM, without a password. Empty: it is in the certificate's file."""
    max_header_bytes: int = Field(default=16384, ge=1024, le=2**20)
    """Most bytes of a request's headers; more are refused with 431."""
    body_seconds: float = Field(default=60.0, ge=0, le=86400)
    """How long a request's body may take to come; then it is refused with 408. 0: no limit."""
    request_seconds: float = Field(default=0.0, ge=0, le=7 * 86400)
    """How long a request may take; then it ends with an error, 504 unless it streams. 0: no limit."""
    api_keys: tuple[SecretStr, ...] = ()
    """Keys that requests need, as `Authorization: Bearer` or `x-api-key`; or `sha256:` and 64 digits. Empty: none."""
    admin_key: SecretStr | None = None
    """Key for what changes the server or shows others' traffic. None: with api_keys that is refused, else open."""
    api_keys_file: UserPath = ""
    """More keys: one a line, or a YAML list with names and limits of their own. Read again at SIGHUP. Empty: none."""
    keyless_metrics: bool = False
    """Whether /metrics needs no key where others do."""
    requests_per_minute: int = Field(default=0, ge=0, le=2**31)
    """Most requests for tokens, per key; more are refused with 429. Without keys: in all. 0: no limit."""
    tokens_per_minute: int = Field(default=0, ge=0, le=2**53)
    """Most tokens, of prompts and answers together, per key in the same way. 0: no limit."""
    log_format: Literal["text", "json"] = "text"
    """text | json: lines of the log for people, or one JSON object each."""
    log_prompts: bool = False
    """Whether the line of a request holds its prompts."""
    metrics_compat: Literal["none", "vllm"] = "none"
    """none | vllm: whether /metrics also has the figures under vLLM's names."""
    otlp_endpoint: Address = Field(default="", pattern=r"^(https?://[^/\s?#]+[^\s]*)?$")
    """Where a span of each request is sent, by OTLP over HTTP: `http://collector:4318`. Empty: nowhere."""

    chat_template: UserPath = ""
    """File with a chat template (Jinja), in place of the checkpoint's. Empty: the checkpoint's."""
    tool_parser: str = "auto"
    """How the model writes tool calls: auto (as its template shows), hermes, qwen_xml, mistral, llama, deepseek, ..."""
    reasoning_parser: str = "auto"
    """What stands around the model's reasoning: auto (as its template shows), think, mistral, seed, gemma or none."""
    served_model_names: tuple[ModelName, ...] = ()
    """Names under which OpenAI's and Anthropic's interface have the model; answers bear the first. Empty: its own."""
    embedding_pooling: Literal["mean", "last"] = "mean"
    """What /v1/embeddings makes of a text's hidden states, unless a request says."""

    @field_validator("allowed_hosts", "allowed_origins", "api_keys", "served_model_names", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_list(value) if isinstance(value, str) else value


class StatisticsSettings(Section):
    """Expert statistics."""

    enabled: bool = True
    """Count which experts the traffic activates."""
    bucket_seconds: float = Field(default=5.0, gt=0, le=3600)
    """Resolution of the time windows."""
    history_minutes: float = Field(default=60.0, gt=0, le=7 * 24 * 60)
    """Longest time window."""
    recent_activations: int = Field(default=256, ge=0, le=65536)
    """How many recent activations to keep."""
    half_life_minutes: float = Field(default=5.0, gt=0, le=7 * 24 * 60)
    """Half-life of the decaying rates."""
    max_labels: int = Field(default=64, ge=0, le=1024)
    """How many labels (`domain`) are counted apart; a request with one more is refused."""
    pair_sampling: int = Field(default=8, ge=0, le=2**20)
    """Co-activation and transitions look at one token in so many; 1: at all, 0: at none."""
    trace_bytes: int = Field(default=256 * 2**20, ge=0)
    """Memory for the traces of requests that ask for their routed experts; more are refused with 503."""
    reference: UserPath = ""
    """A saved set that `drift` compares with. Empty: what was counted since the last reset."""
    file: UserPath = ""
    """File that keeps the statistics of one process across restarts (.npz or safetensors). Empty: they end with it."""
    save_seconds: float = Field(default=300.0, ge=1, le=7 * 86400)
    """How often `file` is written; it is written at the end too."""


class AutoplanSettings(Section):
    """Plans that follow the traffic while the server runs. Needs expert statistics and measured sensitivities."""

    enabled: bool = False
    """Whether weights are taken from other sources by themselves when the use of the experts changes."""
    frozen: bool = False
    """Start without changing anything: what would be proposed is told all the same. `POST /autoplan` changes it."""
    sensitivities: UserPath = ""
    """Folder that `amalgam evaluate --sensitivity` wrote. Empty: the latest of these weights in the user's own."""
    budget: str = Field(default="", max_length=64)
    """What a plan may take: 40GB (of weights), 4.5bpw. Empty: what the weights of the first plan take."""
    memory: str = Field(default="", max_length=64)
    """What weights may take while a candidate and the reference are there too. Empty: 85% of the memory."""
    interval_seconds: float = Field(default=60.0, ge=0.05, le=86400)
    """How often the traffic is looked at."""
    short_minutes: float = Field(default=5.0, gt=0, le=7 * 24 * 60)
    """The traffic that a plan is made for."""
    long_minutes: float = Field(default=60.0, gt=0, le=7 * 24 * 60)
    """The traffic that it is compared with, at most statistics.history_minutes."""
    min_tokens: int = Field(default=2048, ge=256, le=2**40)
    """Tokens that the short window needs before anything is proposed."""
    drift: float = Field(default=0.02, ge=0, le=1)
    """Jensen-Shannon divergence (bits, the mean over layers) from which a new plan is tried. 0: always."""
    min_gain: float = Field(default=0.05, ge=0, lt=1)
    """Share of the KL divergence that a new plan has to remove, with 95% confidence."""
    max_swaps_per_hour: int = Field(default=4, ge=0, le=3600)
    """Most changes of the weights in any hour."""
    sampled_share: float = Field(default=0.25, ge=0, le=1)
    """Share of the requests whose tokens are kept for comparing plans. They are in memory only."""
    sampled_tokens: int = Field(default=4096, ge=2048, le=2**24)
    """Most tokens that are kept, 128 of a request; the oldest make room. Comparing takes time in proportion."""
    max_share: float = Field(default=0.1, gt=0, le=1)
    """Most of one core's time that comparing may take."""


class WeightsSettings(Section):
    """Changes of the weights while they serve."""

    history: UserPath = ""
    """File that keeps what has changed the weights across restarts, one process' own. Empty: it ends with it."""
    resume: bool = False
    """Start by the rules of the last version that new requests started on, and with those that had names or pins."""
    named: dict[WeightsName, dict[Pattern, PlacementValue]] = Field(default_factory=dict, max_length=MAX_KEPT)
    """Versions that requests can ask for, made at the start: name → all its rules, as in `weight_mapping`."""
    watch_seconds: float = Field(default=0.0, ge=0, le=86400)
    """How often the server looks at its configuration file, whose rules come into use when they change. 0: never."""
    look_ahead: bool = True
    """Open the sources that no weight comes from yet once the server has started, so that the first change that uses
    one takes no longer than others."""


class PlanningSettings(Section):
    """Plans for a budget."""

    autoplan: AutoplanSettings = AutoplanSettings()
    """Plans that follow the traffic while the server runs."""


class SpeculationSettings(Section):
    """Tokens that are guessed ahead and verified in one step. Changes no answer."""

    kind: Literal["none", "ngram", "self", "draft"] = "none"
    """Who guesses: earlier text of the request (ngram), the model in its lowest precision (self), another (draft)."""
    num_tokens: int = Field(default=4, ge=1, le=64)
    """Most tokens that are guessed for a request in a step."""
    adaptive: bool = True
    """Guess only as many as pay by the measured times of steps and guesses. false: as many as there is room for."""
    min_match: int = Field(default=3, ge=1, le=32)
    """How many of a request's last tokens must have occurred before (ngram)."""
    draft: ModelPath = ""
    """Folder, `.gguf` file or hub id of a smaller model with the same vocabulary (draft)."""
    source: str = ""
    """Source of the draft's experts, or linear weights if there are none (self). Empty: the smallest for each."""
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    """KV cache of the draft (self, draft). None: as engine.kv_cache_bytes, within a quarter of memory."""


class Settings(Section):
    """Everything, as `config/model_config.yaml` holds it."""

    model: ModelSettings
    """The model and its checkpoints."""
    inference: InferenceSettings = InferenceSettings()
    """How the model runs."""
    server: ServerSettings = ServerSettings()
    """The HTTP server."""
    engine: EngineSettings = EngineSettings()
    """The step loop and the KV cache."""
    statistics: StatisticsSettings = StatisticsSettings()
    """Expert statistics."""
    planning: PlanningSettings = PlanningSettings()
    """Plans for a budget."""
    weights: WeightsSettings = WeightsSettings()
    """Changes of the weights while they serve."""
    speculation: SpeculationSettings = SpeculationSettings()
    """Tokens that are guessed ahead."""
    filters: FiltersSettings = FiltersSettings()
    """What may not pass in prompts, answers and logs."""
    cluster: ClusterSettings = ClusterSettings()
    """Several replicas behind one address."""

    @model_validator(mode="after")
    def _check_named(self) -> Settings:
        known = {BASE_SOURCE, *self.model.mixed_precision.sources}
        for name, mapping in self.weights.named.items():
            for pattern, placement in mapping.items():
                source = placement.source
                if source is not None and source not in known:
                    raise ValueError(
                        f"weights.named[{name!r}][{pattern!r}] names source {source!r}, which is not declared. "
                        f"Declared: {', '.join(sorted(known))}"
                    )
        return self

    def replace(self, **sections: Any) -> Settings:
        """A new object with whole sections exchanged, validated again."""
        return build_settings({**self.model_dump(), **sections})


def build_settings(data: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Settings:
    """Validate a nested mapping.

    Args:
        origins: dotted key → where its value comes from, for messages.

    Raises:
        ConfigError: naming each offending key, its value and what is allowed.
    """
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError("Configuration is invalid:\n" + "\n".join(explain(error, Settings, origins))) from None


def build_rules(mapping: Mapping[str, PlacementLike]) -> tuple[Rule, ...]:
    """Rules from name or pattern → source or placement, in order.

    Raises:
        ConfigError: an empty pattern, an impossible name of a source or device.
    """
    try:
        return tuple(_rule(pattern, value) for pattern, value in mapping.items())
    except ValidationError as error:
        raise ConfigError("weight_mapping is invalid:\n" + "\n".join(explain(error, Rule))) from None


def placing(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """What rules say of devices, without the sources."""
    return tuple(Rule(pattern=rule.pattern, device=rule.device) for rule in rules if rule.device is not None)


def _rule(pattern: str, value: PlacementLike) -> Rule:
    if isinstance(value, Placement):
        return Rule(pattern=pattern, source=value.source, device=value.device)
    return Rule.model_validate(
        {"source": value, "pattern": pattern} if isinstance(value, str) else {**value, "pattern": pattern}
    )
