"""Specs that run as they are: `qapbench run quickstart`."""
