"""`python -m pumice`."""

from pumice.cli import main

main()
