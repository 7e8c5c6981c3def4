"""Everything that knows transformers: which modules take a prefix, and how caches, masks and positions make room."""
