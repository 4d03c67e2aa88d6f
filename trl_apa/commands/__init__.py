"""The commands of `trl-apa`, one a file, each with `main(argv) -> exit status`."""
