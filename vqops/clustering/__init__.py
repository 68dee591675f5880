"""Residual k-means, the codes it learns, and the IDs of rows that come of them."""
