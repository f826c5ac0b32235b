"""From a run to an artefact that other programs load."""

import affina.models  # noqa: F401 - before PEFT, which imports bitsandbytes: see models/compat.py
