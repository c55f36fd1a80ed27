"""Bases and a cache of their own, as the tests of runs have them."""

from ..runs.conftest import bert, data_cache, llama

__all__ = ["bert", "data_cache", "llama"]
