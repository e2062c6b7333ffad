"""Keys by inner product: an index over keys, and searches that visit few of them."""
