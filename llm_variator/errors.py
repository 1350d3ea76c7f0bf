"""The one exception for everything a user can mend."""


class VariatorError(ValueError):
    """Wrong input: a flag, file, shape, model or plugin. The message names the mend.

    Command lines print it as one line, without a traceback, and exit with status 2.
    """
