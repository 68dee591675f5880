"""`python -m vqops`: the command line."""

import sys

from vqops.cli import main

sys.exit(main())
