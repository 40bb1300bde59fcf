# SPDX-License-Identifier: Apache-2.0
"""Is transformers installed, and new enough?"""

from __future__ import annotations

from importlib import metadata

MINIMUM = 5


def check_transformers() -> None:
    """Raises an ImportError that names the extra where transformers is missing or older than version 5."""
    advice = "Install it with: pip install 'eloftr-ops[transformers]'"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"transformers: expected version {MINIMUM} or newer, found none. {advice}") from error
    if int(version.split(".")[0]) < MINIMUM:
        raise ImportError(f"transformers: expected version {MINIMUM} or newer, got {version}. {advice}")
