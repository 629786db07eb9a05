"""`python -m repfx`: the command line."""

from repfx.cli import main

main()
