"""Command line: ``python -m sentfast doctor``, and programs run with sentfast imported before their first line."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Sequence

from sentfast import doctor

USAGE = """\
python -m sentfast doctor [-v] [--json]        what is installed, what runs where, whether it computes the right thing
python -m sentfast SCRIPT.py [ARGUMENTS ...]   runs a script with sentence-transformers accelerated
python -m sentfast -m MODULE [ARGUMENTS ...]   runs a module so
"""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "doctor":
        return diagnose(words[1:])
    if words[0] == "-m" and len(words) > 1:
        run_module(words[1], words[2:])
        return 0
    if words[0].startswith("-") or not os.path.exists(words[0]):
        sys.stderr.write(f"python -m sentfast: expected doctor, -m MODULE or a script that exists, got {words[0]!r}\n")
        sys.stderr.write(USAGE)
        return 2
    run_script(words[0], words[1:])
    return 0


def diagnose(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sentfast doctor",
        description="Checks the installation. Exit status: 0 healthy, 3 healthy but at stock speed, 4 broken.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="every operator and every patched function")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    diagnosis = doctor()
    _print(json.dumps(diagnosis.to_dict(), indent=2) if options.json else diagnosis.text(options.verbose))
    return diagnosis.exit_code


def _print(text: str) -> None:
    """To a reader that may have gone when it had enough (``| head``): nothing more can reach it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_script(path: str, arguments: Sequence[str]) -> None:
    """As ``python PATH ARGUMENTS``: the script's folder, not the current one, is first on sys.path."""
    sys.argv = [path, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    runpy.run_path(path, run_name="__main__")


def run_module(name: str, arguments: Sequence[str]) -> None:
    """As ``python -m NAME ARGUMENTS``."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main())
