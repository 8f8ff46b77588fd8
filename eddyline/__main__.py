"""`python -m eddyline` is the command line."""

from eddyline.cli.main import main

main()
