"""The commands of the command line, one module each.

`help_text()` and `run(arguments) -> exit status`.

Together with :mod:`diffpolicy.config` this is the only place that builds everything from configs.
"""
