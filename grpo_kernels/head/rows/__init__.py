"""The arithmetic of a tile's rows, between its matrix products: ``plain`` in torch, ``triton_rows`` in Triton."""
