"""`python -m trl_apa.demo`."""

from . import main


raise SystemExit(main())
