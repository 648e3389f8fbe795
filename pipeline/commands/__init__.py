"""The commands, one function each: parse nothing, decide nothing about training."""
