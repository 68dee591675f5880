"""Between a quantizer's caller and its codebook: axes of the input and the results, losses."""
