"""What residual quantizers are built of: ways through the levels, and what decides between them."""
