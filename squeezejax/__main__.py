"""`python -m squeezejax`: the command line, wherever the console script is not on the path."""

import sys

from squeezejax.cli import main

sys.exit(main())
