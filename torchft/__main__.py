"""`python -m torchft` is the command `tune`, also where another package owns that name."""

from torchft.cli import main

main()
