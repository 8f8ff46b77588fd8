"""`python -m cli` is the command line."""

from cli.main import main

main()
