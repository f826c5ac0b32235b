"""Adapter methods: how one is attached, saved, loaded and switched off. Which there are: catalog/methods.py."""

from affina.catalog.methods import METHODS, AdapterMethod, method_named
from affina.models.adapters.attach import attach_adapter, has_adapter, settings_of
from affina.models.adapters.files import AdapterInfo, read_adapter_info
from affina.models.adapters.identity import base_identity
from affina.models.adapters.storage import load_adapter, save_adapter
from affina.models.adapters.switch import adapter_disabled
from affina.models.adapters.targets import resolve_targets

__all__ = [
    "METHODS",
    "AdapterInfo",
    "AdapterMethod",
    "adapter_disabled",
    "attach_adapter",
    "base_identity",
    "has_adapter",
    "load_adapter",
    "method_named",
    "read_adapter_info",
    "resolve_targets",
    "save_adapter",
    "settings_of",
]
