"""The names under which an adapter's parameters are in the model and in its file."""

# The child of the model that holds all prefixes.
LAYER_NAME = "prefix_tuning_v2"
# PEFT's prefix of this method: the name of each container of parameters starts with it.
PREFIX = "prefix_tuning_v2_"
