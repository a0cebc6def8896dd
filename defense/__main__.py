"""`python -m defense`: the command line."""

from defense.cli import main

main()
