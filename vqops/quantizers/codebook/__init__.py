"""Codes and how they learn: search, EMA update, k-means, replacement of dead codes, agreement between ranks."""
