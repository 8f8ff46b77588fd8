"""`python -m eddyline` is the command line."""

from cli.main import main

main()
