"""`python -m gradstream.coordinator.cli` is the `gradstream` command."""

import sys

from gradstream.coordinator.cli import main

sys.exit(main())
