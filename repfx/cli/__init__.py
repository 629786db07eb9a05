"""The command line: parse, call, print."""

from repfx.cli.main import main

__all__ = ["main"]
