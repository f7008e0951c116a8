"""`python -m jlora` is `jlora`."""

import sys

from jlora.cli.main import main

sys.exit(main())
