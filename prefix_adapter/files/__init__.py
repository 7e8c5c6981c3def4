"""The files of an adapter: where they are, whether they can be trusted, how they are written."""
