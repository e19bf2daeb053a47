"""`python -m engine` is the `engine` command, for where that is not on the PATH."""

import sys

from engine.cli import main

sys.exit(main())
