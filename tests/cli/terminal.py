"""The command line as a process, and on a terminal of a given width."""

import os
import pty
import subprocess
import sys
import threading

MOETUNER = [sys.executable, "-m", "moetuner"]
WAIT = 200  # seconds for any one event, however busy the machine is


def run_in_terminal(command, columns, code=0):
    """Output of `command` on a terminal of 24 lines and `columns`."""
    main, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "24"}
    process = subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, env=environment
    )
    os.close(other)
    chunks = []

    def read():
        try:
            while chunk := os.read(main, 65536):
                chunks.append(chunk)
        except OSError:
            pass  # the last writer is gone

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(timeout=WAIT) == code
    reader.join()
    os.close(main)
    return b"".join(chunks).decode()
