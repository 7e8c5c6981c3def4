"""The parts of a PEFT method that all methods of this package share."""
