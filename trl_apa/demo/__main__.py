"""`python -m trl_apa.demo`."""

import sys

from trl_apa.cli import main


raise SystemExit(main(["demo", *sys.argv[1:]]))
