"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can mend. One line: the thing, where it is, and what was expected.

    Jobs print it without a traceback and exit with code 2 (see `cpmjax.run.cli.main`).
    """
