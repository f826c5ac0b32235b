"""What is wrong with a set of conversations as a whole: repeats, contradictions, and validation records in training.

Everything here works on hashes and signatures: about 450 bytes per record stay in memory, whatever the length of the
texts.
"""

from affina.data.quality.duplicates import (
    Conflict,
    DuplicateFinder,
    Duplicates,
    deduplicate,
    find_duplicates,
)
from affina.data.quality.leakage import Leak, LeakageReport, find_leakage
from affina.data.quality.texts import conversation_hash, normalize, prompt_and_reply

__all__ = [
    "Conflict",
    "DuplicateFinder",
    "Duplicates",
    "Leak",
    "LeakageReport",
    "conversation_hash",
    "deduplicate",
    "find_duplicates",
    "find_leakage",
    "normalize",
    "prompt_and_reply",
]
