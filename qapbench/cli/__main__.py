"""Runs the command line as `python -m qapbench.cli`."""

from . import main

main()
