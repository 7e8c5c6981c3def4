"""The prefixes of a model: their parameters, which row of a batch gets which, and the hooks that put them in place."""
