"""The configuration: Kata's TOML file and its drop-ins -> frozen dataclasses; what a pod may override.

Imported by the shim at each pod start, so nothing here imports what only an error needs.
"""

from vc.config.annotations import apply_annotations
from vc.config.load import DEFAULT_PATHS, find, load, missing_files
from vc.config.schema import AgentConfig, Config, FactoryConfig, HypervisorConfig, Key, RuntimeConfig, keys

__all__ = [
    "DEFAULT_PATHS",
    "AgentConfig",
    "Config",
    "FactoryConfig",
    "HypervisorConfig",
    "Key",
    "RuntimeConfig",
    "apply_annotations",
    "find",
    "keys",
    "load",
    "missing_files",
]
