"""`python -m qapbench.cli`."""

from . import main

main()
