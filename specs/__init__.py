"""Specs that come with qapbench and run without changes, such as `qapbench run quickstart`."""
