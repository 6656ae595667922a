"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can mend. One line: the thing, where it is, and what was expected.

    Jobs print it without a traceback and exit with code 2 (see `cpmjax.run.cli.main`).
    """


class DiskFull(UserError):
    """There is no room for what was being written; going on with something else would not find any either."""


class Unreachable(UserError):
    """The network brings nothing more; going on with another file would only lose what came of this one."""
