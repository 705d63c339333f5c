"""`python -m hga` is the command `hga`."""

from hga.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
