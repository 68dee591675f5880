"""The signals of a terminal, wherever the tests are started from."""

import signal

# A job in the background of a shell ignores Ctrl-C, which trainings respect. What the tests start inherits this.
signal.signal(signal.SIGINT, signal.default_int_handler)
