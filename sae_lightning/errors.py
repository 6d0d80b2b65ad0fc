"""The one exception that reaches a person as a single line instead of a traceback."""


class UserError(ValueError):
    """Something the user can put right.

    The message is one line: the dotted setting, the value received, and the remedy.
    Entry points print it and exit with code 1; a traceback would only hide it.
    """
