"""Attention with edits: ``reference`` is the specification, ``blocked`` the PyTorch path that never holds N x M."""
