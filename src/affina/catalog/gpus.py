"""Facts about GPUs from assets/cards/gpus.json: memory that CUDA offers, dense peaks, bandwidth, power."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from affina.errors import ConfigError

OLDEST_FUSED_CAPABILITY = (8, 0)
"""Before Ampere there is neither flash attention nor a matrix product of Triton's; the reference does better there."""
FP8_CAPABILITY = (8, 9)
"""8-bit matrix units: Ada, Hopper and later."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card.

    memory_gib:   what CUDA reports as its capacity, below the number on the box
    tflops_*:     dense peaks with float32 accumulation, None where there are no such units
    memory_source: where memory_gib comes from; "estimate: …" where nobody was found to have printed it
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    memory_gib: float
    tflops_fp16: float
    tflops_bf16: float | None
    tflops_fp8: float | None
    bandwidth_gb_s: float
    capability: tuple[int, int]
    tdp_watts: int
    multiprocessors: int
    architecture: str
    memory_source: str

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)

    @property
    def has_bfloat16(self) -> bool:
        return self.tflops_bf16 is not None

    @property
    def multiplies_fp8(self) -> bool:
        return self.capability >= FP8_CAPABILITY

    @property
    def runs_fused(self) -> bool:
        """Whether the fast engine runs on it."""
        return self.capability >= OLDEST_FUSED_CAPABILITY


@lru_cache(maxsize=1)
def gpus() -> dict[str, Gpu]:
    """All cards by name, smallest memory first."""
    raw = json.loads(files("affina.catalog").joinpath("assets", "cards", "gpus.json").read_text(encoding="utf-8"))
    cards = [
        Gpu(**{**entry, "aliases": tuple(entry["aliases"]), "capability": tuple(entry["capability"])})
        for entry in raw["cards"]
    ]
    return {card.name: card for card in sorted(cards, key=lambda card: card.memory_gib)}


def gpu_named(name: str) -> Gpu:
    """The card called `name`, in any usual spelling. Raises ConfigError[gpu-unknown] with the nearest names."""
    card = find_gpu(name)
    if card is not None:
        return card
    keys = {_plain(key): card.name for card in gpus().values() for key in (card.name, *card.aliases)}
    near = list(dict.fromkeys(keys[key] for key in difflib.get_close_matches(_plain(name), keys, 6, 0.5)))[:3]
    raise ConfigError(
        "gpu-unknown",
        f'there is no card "{name}" in the catalog',
        why=f"it has {', '.join(gpus())}; `this` is the card of this machine, `all` are all of them",
        fix=f"did you mean {' or '.join(near)}?" if near else "take one of those, or give its memory: --fit GiB",
    )


def find_gpu(name: str) -> Gpu | None:
    """The card that a name means, such as what the driver reports: `NVIDIA H100 80GB HBM3`; None: no entry."""
    wanted = _plain(name)
    for card in gpus().values():
        if wanted in {_plain(key) for key in (card.name, card.title, *card.aliases)}:
            return card
    return None


def _plain(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "", name.lower())
    return re.sub(r"^(nvidia|tesla|geforce)+", "", words) or words
