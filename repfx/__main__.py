"""`python -m repfx`: the command line."""

from repfx.cli import main

if __name__ == "__main__":
    main()
