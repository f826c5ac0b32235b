"""Decoder families that the fast engine knows: the description is data of the catalog, which needs no torch."""

from transformers import PretrainedConfig

from affina.catalog import decoder
from affina.catalog.decoder import FAMILIES, DecoderSpec, Family, Unsupported

__all__ = ["FAMILIES", "DecoderSpec", "Family", "Unsupported", "read_decoder"]


def read_decoder(config: PretrainedConfig) -> DecoderSpec | Unsupported:
    """The decoder that `config` describes, or why the fast engine does not run it."""
    return decoder.read_decoder({**config.to_dict(), "model_type": config.model_type})
