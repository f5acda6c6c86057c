"""What can go wrong, in words.

Every message names the argument, what came, what is allowed and, where there is one, the way out.
"""

from __future__ import annotations


class LongscanError(Exception):
    """Base of every error this package raises on purpose."""


class ArgumentError(LongscanError, ValueError):
    """An argument has a shape, dtype, device or value that is not allowed."""


class BackendError(LongscanError, RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


class ConfigError(LongscanError, ValueError):
    """A configuration holds an unknown key, or a value of the wrong kind."""


class CheckpointError(LongscanError, RuntimeError):
    """A checkpoint is missing, damaged, truncated or of another model."""


class DataError(LongscanError, RuntimeError):
    """A corpus, tokenizer or data file cannot be used."""


class StorageError(LongscanError, OSError):
    """A file could not be written; what was there before is untouched."""


class TrainingError(LongscanError, RuntimeError):
    """Training cannot go on: the loss or the gradient is no longer a number."""


class IntegrationError(LongscanError, RuntimeError):
    """Another package is missing, or is not as this one must find it to work with it."""
