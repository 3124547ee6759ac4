"""`python -m squeezejax`: the command line, wherever the console script is not on the path."""

import sys

from squeezejax.command_line.cli import main

sys.exit(main())
