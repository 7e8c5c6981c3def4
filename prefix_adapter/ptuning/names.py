"""The names under which an adapter's parameters are in the model and in its file."""

# The child of the model that holds the virtual tokens of all adapters.
LAYER_NAME = "ptuning"
# PEFT's prefix of this method: the name of each container of parameters starts with it.
PREFIX = "ptuning_"
