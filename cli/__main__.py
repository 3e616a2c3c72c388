"""`python slim.py` and `python -m cli` start here."""

from cli import main

raise SystemExit(main())
