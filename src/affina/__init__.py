"""affina: fine-tune language models on the hardware you have, and trust the result."""

__version__ = "0.1.0"
