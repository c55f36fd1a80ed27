"""Runs: from a recipe to a trained adapter in a folder."""
