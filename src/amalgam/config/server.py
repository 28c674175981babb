"""Settings of the HTTP server: section `server`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, StringConstraints, field_validator

from amalgam.config.fields import Address, Section, UserPath, split_list

HostName = Annotated[str, StringConstraints(pattern=r"^(\*|(\*\.)?[a-z0-9_.-]+|\[?[0-9a-f:.]+\]?)$", to_lower=True)]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/\s?#]+)$", to_lower=True)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


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
