"""The `coeld` command. Each subcommand is a file; nothing heavy is imported before it is used."""
