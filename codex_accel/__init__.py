"""codex-accel: train a language model on your own data and be able to answer for it."""

__version__ = "0.1.0"
