"""Saved adapters: read, convert and publish them, initialize a new one from them, and serve many of them."""
