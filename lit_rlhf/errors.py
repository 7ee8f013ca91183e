"""The exception for errors that the user can fix: one clear line, exit code 2, no traceback."""


class UserError(ValueError):
    """Bad input or a contradictory setting.

    The message names what is wrong, where (file and line, or setting), and how to fix it.
    """


class RankError(UserError):
    """One that this rank alone has raised: the others wait for it in a collective call, so the run must end."""
