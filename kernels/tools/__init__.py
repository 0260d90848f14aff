"""Measuring, compiling ahead of time and reading what was compiled."""
