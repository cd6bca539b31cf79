"""`python -m jobs`: the command line, where only the code is there."""

from jobs.cli import main

main()
