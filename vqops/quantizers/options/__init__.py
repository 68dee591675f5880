"""The options of quantizers: which values are allowed, and those that may change between steps."""
