"""Which implementation of an op runs: `library` defines and selects, `choice` holds the table of CUDA."""
