"""Command line: ``python -m sentfast doctor``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from sentfast import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sentfast", description="sentence-transformers, made fast.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    check = commands.add_parser(
        "doctor",
        help="what is installed, what runs where, and whether it computes the right thing",
        description="Checks the installation. Exit status: 0 healthy, 4 something is broken.",
    )
    check.add_argument("--json", action="store_true", help="print JSON instead of text")
    if parser.parse_args(arguments).command is None:
        parser.print_help()
        check.print_help()
        return 0
    diagnosis = doctor()
    print(json.dumps(diagnosis.to_dict(), indent=2) if parser.parse_args(arguments).json else diagnosis)
    return 0 if diagnosis.healthy else 4


if __name__ == "__main__":
    sys.exit(main())
