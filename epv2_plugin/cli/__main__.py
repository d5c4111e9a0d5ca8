"""`python -m epv2_plugin.cli`: how the launcher starts ranks."""

import sys

from epv2_plugin.cli import main

sys.exit(main())
