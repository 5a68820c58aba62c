"""Mistakes that a user can mend, told in one line each.

Rule: whatever a user can cause (a config key, a data file, a damaged folder) raises `UserError`; `cli.run` prints its
problems without a traceback and ends with exit code 2. Everything else is a defect of ours and keeps its traceback.
"""


class UserError(Exception):
    """One or more problems, each a line `<where>: <what is wrong, with the value>. <what to do>.`"""

    def __init__(self, *problems: str):
        if not problems:
            raise ValueError("UserError needs at least one problem")
        super().__init__("\n".join(problems))
        self.problems = list(problems)
