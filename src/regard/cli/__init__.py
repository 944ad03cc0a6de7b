"""The command line: parses arguments and prints results, nothing else."""


def main() -> None:
    """Entry point of the `regard` command."""
    from regard.cli.app import run  # loaded here so that importing the package stays light

    run()
