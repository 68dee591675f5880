"""Between a quantizer's caller and its codebook: options, axes of the input and the results, losses."""
