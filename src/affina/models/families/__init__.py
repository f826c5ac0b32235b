"""Decoder families that the fast engine knows, described as data."""

from affina.models.families.decoder import DecoderSpec, Unsupported
from affina.models.families.registry import FAMILIES, Family, read_decoder

__all__ = ["FAMILIES", "DecoderSpec", "Family", "Unsupported", "read_decoder"]
