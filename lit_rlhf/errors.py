"""The one exception that means "the user can mend this": one clear line, exit code 2, no traceback."""


class UserError(ValueError):
    """Bad input or a contradictory setting.

    The message names what is wrong, where (file and line, or setting), and how to mend it.
    """
