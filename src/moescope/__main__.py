"""`python -m moescope` is `moescope`."""

import sys

from moescope.cli import main

sys.exit(main())
