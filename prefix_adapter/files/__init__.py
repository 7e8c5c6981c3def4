"""The files of an adapter: how they are found, checked and written."""
