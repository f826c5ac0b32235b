"""Models: loading, weight formats, adapters, forward passes, generation.

Importing PEFT imports bitsandbytes where it is installed, and that reaches for the network; see compat.py.
"""

from affina.models.compat import import_bitsandbytes_offline

import_bitsandbytes_offline()
