"""Locating checkpoints by embedded name, folder or hub id, and assembling embedded models on first use."""
