"""`python -m proxy` is the command `pullpool`."""

from proxy.cli.main import main

main()
