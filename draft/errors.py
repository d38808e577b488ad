"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what is wrong, which value, and the way out.

    Command lines print the sentence and exit with status 2; nothing is half-written when it is raised.
    """
