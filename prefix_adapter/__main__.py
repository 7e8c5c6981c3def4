"""The command line as a module: `python -m prefix_adapter` and `accelerate launch -m prefix_adapter train ...`."""

from .cli import main

main()
