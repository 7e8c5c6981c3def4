"""`python -m prefix_adapter`, for `accelerate launch -m prefix_adapter train ...`."""

from .cli import main

main()
