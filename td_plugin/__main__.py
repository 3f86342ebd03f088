"""`python -m td_plugin` is `td-plugin`."""

from td_plugin.cli import main

main()
