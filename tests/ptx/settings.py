"""What to execute, and how: read from the environment, which tests' own child processes inherit.

``SENTFAST_TEST_PTX``         triton-80, triton-90, cuda-80 ...: whose kernels, for which compute capability
``SENTFAST_TEST_PTX_MOMENT``  early, late, random or late_products: when asynchronous copies and products happen
``SENTFAST_TEST_PTX_LOG``     a folder where each process leaves the names of the kernels that it launched
"""

from __future__ import annotations

import os

MOMENTS = ("early", "late", "random", "late_products")
VARIABLE = "SENTFAST_TEST_PTX"


def asked() -> tuple[str, str] | None:
    """(backend, architecture); None where the tests run on what the machine has."""
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    backend, _, architecture = value.partition("-")
    if backend not in ("triton", "cuda") or not architecture.rstrip("a").isdigit():
        raise ValueError(f"{VARIABLE}: expected triton-<capability> or cuda-<capability>, got {value!r}")
    return backend, architecture


def moment() -> int:
    """The interpreter's number of the moment that the environment asks for; at random where it does not."""
    value = os.environ.get("SENTFAST_TEST_PTX_MOMENT", "random")
    if value not in MOMENTS:
        raise ValueError(f"SENTFAST_TEST_PTX_MOMENT: expected one of {MOMENTS}, got {value!r}")
    return MOMENTS.index(value)


def seed() -> int:
    return int(os.environ.get("SENTFAST_TEST_SEED") or 0)


def log() -> str | None:
    return os.environ.get("SENTFAST_TEST_PTX_LOG")
