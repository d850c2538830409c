"""What all commands share: how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from vlpfast.types import PeerError, UserError


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a command on sys.argv. A UserError ends it with one line on stderr and exit code 2, Ctrl-C with 130."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        if not isinstance(error, PeerError):
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
