"""A script in two processes that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.distributed import TCPStore


def run_in_two(script: str, *arguments: str, timeout: int = 300, **variables: str) -> None:
    """Runs a script that lies beside the tests as ranks 0 and 1; both have to end well."""
    # The store is kept here and picks its own port: one that is looked up first may be taken before it is used.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    here = Path(__file__).parent
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(here.parent), os.environ.get("PYTHONPATH")])),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        **variables,
    }
    command = [sys.executable, "-W", "ignore", str(here / script), *arguments]
    processes = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        with ThreadPoolExecutor() as pool:  # reads both, so that neither waits with a full pipe
            outputs = list(pool.map(lambda process: process.communicate(timeout=timeout)[0], processes))
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in outputs)
