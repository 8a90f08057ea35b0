"""What the children of `test_workers` do."""

import os
import sys
import threading


class Counting:
    """Numbers its tasks; tells each one before it is done."""

    def __init__(self):
        self.done = 0

    def __call__(self, task, until, tell):
        tell(("begun", task))
        sys.stdout.write("not a message\n")
        self.done += 1
        return {"task": task, "number": self.done, "until": until, "pid": os.getpid()}


class Failing:
    """Does what it is told to."""

    def __call__(self, task, _, tell):
        if task == "exit":
            os._exit(3)
        if task == "raise":
            raise ValueError("no such task")
        if task == "hang":
            tell(os.getpid())
            threading.Event().wait()
        return task


class Unmade:
    def __init__(self):
        raise RuntimeError("nothing works here")
