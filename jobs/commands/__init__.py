"""The commands of `longvlm`, by what they are for."""
