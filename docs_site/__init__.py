"""What `make docs` builds the documentation site with."""
