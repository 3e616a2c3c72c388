"""`python slim.py` and `python -m cli` start here."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

from cli import main

raise SystemExit(main())
