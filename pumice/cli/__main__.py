"""`python -m pumice.cli`."""

from pumice.cli import main

main()
