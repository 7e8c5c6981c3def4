"""Saved adapters: convert, exchange and publish them, start a new one from them, and serve many of them."""
