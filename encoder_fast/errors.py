"""The exceptions that encoder_fast raises on its own account."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """The model, or this configuration of it, has no fast path. Nothing was changed."""


class FallbackError(RuntimeError):
    """A call would have run the original forward, and ``strict=True`` forbids that."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and can't run here. The message says why."""


class ModelFilesError(ValueError):
    """A file of a model's folder is damaged, or asks for something that is not supported.

    The message names the file and, where it has one, the key.
    """


class ParityError(AssertionError):
    """A patched model breaks the parity rule."""


class NotFastError(Exception):
    """Why this call can't run fast. Internal: it becomes a counted run of the original forward."""
