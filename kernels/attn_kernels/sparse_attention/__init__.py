"""Attention of which each tile of queries visits some keys alone."""
