"""Computes the row arithmetic between a tile's matrix products: ``plain`` in torch, ``triton_rows`` in Triton."""
