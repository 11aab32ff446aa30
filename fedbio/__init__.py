"""Federated learning from protein sequences that stay where they are."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
