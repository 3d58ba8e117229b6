"""The whole Ray Serve config file, checked before Serve sees it.

Serve takes misspelt keys without a word and listens on every address unless told otherwise; both are refused here.
Values that belong to Serve itself are left to Serve. Knows nothing of Ray's code.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.config import AppConfig, haproxy_is_forced
from serve_app.errors import ConfigError
from serve_app.known_keys import refuse_unknown
from serve_app.serve_keys import SERVE_KEYS

APPLICATION = "serve_app.cluster.application:build"
MAX_CONFIG_BYTES = 1 << 20  # ours is 4 KiB
SERVE_DEFAULT_HOST = "0.0.0.0"  # of http_options.host (ray.serve.schema.HTTPOptionsSchema)
SERVE_DEFAULT_PORT = 8000


@dataclass(frozen=True, slots=True)
class ServeFile:
    """One Serve config file that holds our application and nothing unknown."""

    host: str
    port: int
    root_path: str  # of http_options and route_prefix together, without a closing slash; "" for the root
    app: AppConfig
    document: dict[str, Any]  # as read, for handing on to Serve

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{self.root_path}"


def load_config(path: Path) -> ServeFile:
    """The checked content of a Serve config file. Raises ConfigError naming the file and the key at fault."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"cannot read the config file {path}: {e.strerror}") from e
    try:
        return parse_serve_config(data)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def parse_serve_config(data: bytes) -> ServeFile:
    """The checked content of the YAML text of a Serve config file. Raises ConfigError."""
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"larger than {MAX_CONFIG_BYTES} bytes, so it is no config file of ours")
    document = _read_yaml(data)
    refuse_unknown(document, SERVE_KEYS, "config")
    http = document.get("http_options") or {}
    if not isinstance(http, dict):
        raise ConfigError("config.http_options: expected keys and values, found a list")
    applications = document.get("applications")
    if not isinstance(applications, list) or len(applications) != 1:
        raise ConfigError("config.applications: expected a list of exactly one application, ours")
    (application,) = applications
    if not isinstance(application, dict):
        raise ConfigError("config.applications[0]: expected keys and values, found a list")
    if application.get("import_path") != APPLICATION:
        raise ConfigError(
            f"config.applications[0].import_path: expected {APPLICATION!r}, found {application.get('import_path')!r}"
        )
    app = AppConfig.parse(application.get("args") or {})
    host = http.get("host", application.get("host") or SERVE_DEFAULT_HOST)
    port = http.get("port", application.get("port") or SERVE_DEFAULT_PORT)
    if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 65536:
        raise ConfigError(f"config.http_options: cannot listen on host {host!r}, port {port!r}")
    for where in {host, application.get("host") or host}:
        refuse_exposure(where, app)
    prefix = f"{http.get('root_path') or ''}{application.get('route_prefix') or '/'}".rstrip("/")
    return ServeFile(host, port, prefix, app, document)


def refuse_exposure(host: str, app: AppConfig) -> None:
    """Returns if only this machine can connect, or clients must show an API key. Raises ConfigError otherwise."""
    if app.ingress.api_keys is not None:
        return
    if app.ingress.proxy == "haproxy" or haproxy_is_forced():
        who = "HAProxy (ingress.proxy, or RAY_SERVE_ENABLE_HA_PROXY) listens on every address"
    elif not _is_loopback(host):
        who = f"http_options.host {host!r} can be reached from other machines"
    else:
        return
    raise ConfigError(
        f"{who}, and no API key is asked for. Set ingress.api_keys.file to a file of keys, or listen on "
        f"http_options.host: 127.0.0.1 with ingress.proxy: serve"
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may resolve to anything


class _StrictLoader(yaml.SafeLoader):
    """YAML without the two traps: a key given twice (the last wins) and aliases (a bomb of references)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise ConfigError(f"YAML aliases are not accepted (line {line})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise ConfigError(f"a key stands twice in the mapping at line {node.start_mark.line + 1}")
        return mapping


def _read_yaml(data: bytes) -> dict[str, Any]:
    try:
        document = yaml.load(data, _StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise ConfigError(f"is not YAML: {e}") from e
    if not isinstance(document, dict):
        raise ConfigError("expected a Ray Serve config: keys such as http_options and applications")
    return document
