"""The exceptions for what a user can get wrong."""


class UserError(ValueError):
    """A mistake in a config, a file or a command line.

    The message says what is wrong, where (key, file:line or tensor) and what to do. The command line prints it without
    a traceback; in a notebook or a test it is an ordinary ValueError.
    """


class ConfigError(UserError):
    """Wrong options, found before anything is loaded: the command line exits with status 2 instead of 1."""
