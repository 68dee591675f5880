"""`python -m vqops`: the command line."""

import sys

from vqops_cli import main

sys.exit(main())
