"""The configuration, in four rooms: `types`, what a value may be; `keys`, every key (sections have files of their own);
`rules`, how keys depend on one another; `read`, from YAML and environment variables to these. Each uses only those
before it. Others import from here.
"""

from extproc.config.changes import changes
from extproc.config.doubts import doubts
from extproc.config.endpoints import (
    DiscoveryConfig,
    DnsConfig,
    EndpointConfig,
    HealthCheckConfig,
    InferencePoolConfig,
    KubernetesConfig,
    SourceConfig,
    target_of,
)
from extproc.config.keys import Config, sections
from extproc.config.read import load_config, parse_config
from extproc.config.replicas import LeaseConfig, ReplicasConfig, ReplicasTlsConfig, ValkeyConfig
from extproc.config.requests import PickerConfig
from extproc.config.rules import cross_check
from extproc.config.tls import TlsConfig, TlsEnvoyConfig
from extproc.config.types import require_address, require_ip, require_listen, split_address

__all__ = [
    "Config",
    "DiscoveryConfig",
    "DnsConfig",
    "EndpointConfig",
    "HealthCheckConfig",
    "InferencePoolConfig",
    "KubernetesConfig",
    "LeaseConfig",
    "PickerConfig",
    "ReplicasConfig",
    "ReplicasTlsConfig",
    "SourceConfig",
    "TlsConfig",
    "TlsEnvoyConfig",
    "ValkeyConfig",
    "changes",
    "cross_check",
    "doubts",
    "load_config",
    "parse_config",
    "require_address",
    "require_ip",
    "require_listen",
    "sections",
    "split_address",
    "target_of",
]
