"""Commands of `trl-apa`, run in this process as the terminal runs them."""

from trl_apa import cli


def run(command, *argv):
    """The exit status, however the command ends."""
    try:
        return cli.main([command, *map(str, argv)])
    except SystemExit as ended:
        return ended.code


def refused(capsys, command, *argv):
    """What is said by a command that ends with status 2."""
    capsys.readouterr()
    assert run(command, *argv) == 2
    return capsys.readouterr().err.strip()
