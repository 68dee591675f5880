"""The contract of each op, a family a file: schema, checks, fake, autograd, and the docstring with the equation."""
