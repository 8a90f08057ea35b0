"""The benchmark between two nodes, small: a network of namespaces, Gloo, real bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_programs

pytest.importorskip("torch", reason="torch is not installed")

FOLDER = Path(__file__).parents[2] / "benchmarks" / "exchange"
NOT_PERMITTED = 3
SIZES = {"ranks-per-node": 2, "tokens": 96, "hidden": 512, "repeats": 2, "gbit": 0}
HEADERS = 0.03  # of a packet of 9000 bytes, and acknowledgements of the other way


# Ranks are forked, not started: an import of torch takes longer than what they do.
FORKS = """
import json, os, runpy, signal, sys, time
import two_nodes

class Rank:
    returncode = None
    def __init__(self, rank, node, options, folder):
        task = vars(options) | {"node": two_nodes.asdict(node), "rank": rank}
        self.pid = os.fork()
        if self.pid:
            return
        os.environ.update(node.environment())
        sys.argv = ["", json.dumps(task | {"folder": folder})]
        code = 1
        try:
            runpy.run_path(str(two_nodes.RANK_PROGRAM), run_name="__main__")
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(code)
    def poll(self, how=os.WNOHANG):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode
    def wait(self, timeout=0):
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.poll(how=0)

two_nodes.start_rank = Rank
two_nodes.main()
"""


def started(arguments):
    """The benchmark as it is started, its ranks with it."""
    command = [sys.executable, "two_nodes.py", *arguments]
    return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)


def forked(arguments):
    program = f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{FORKS}"
    (done,) = run_programs([["-c", program, *arguments]], cwd=FOLDER, ranked=False)
    return done


@pytest.mark.parametrize(
    "begin", [forked, pytest.param(started, marks=pytest.mark.slow)]
)
def test_bytes_between_two_nodes_are_the_predicted_rows(tmp_path, begin):
    out = tmp_path / "results.json"
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    done = begin(["--device=cpu", f"--out={out}", *sizes])
    if done.returncode == NOT_PERMITTED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    results = {r["method"]: r for r in json.loads(out.read_text())["results"]}
    told = [r for r in results.values() if r["predicted_bytes"]]
    assert len(told) == 3
    for result in told:
        excess = result["sent_bytes"] / result["predicted_bytes"] - 1
        assert 0 < excess < HEADERS, result
    one, two = (results[f"moetuner, contiguous{x}"] for x in ("", ", two levels"))
    assert two["rows"] < one["rows"]
    assert two["sent_bytes"] < one["sent_bytes"]


SERVE = """
def serve(node, told, num=1):
    enter(node)
    server = socket.create_server((node.address, 5000), backlog=num)
    os.write(told, b"1")
    for came in [server.accept()[0] for _ in range(num)]:
        left = SIZE
        while left:
            left -= len(came.recv(left))
        came.sendall(b"1")
    os._exit(0)
"""
SEND = """
import os, socket, sys, time
from network import NotPermitted, enter, two_nodes

SIZE, GBIT = 1 << 20, 0.1
%s
try:
    with two_nodes(GBIT) as (here, there):
        listening, told = os.pipe()
        if os.fork() == 0:
            serve(there, told)
        os.read(listening, 1)
        enter(here)
        with socket.create_connection((there.address, 5000)) as out:
            begun = time.perf_counter()
            out.sendall(bytes(SIZE))
            out.recv(1)
            print(time.perf_counter() - begun, SIZE * 8 / (GBIT * 1e9))
        os.wait()
except NotPermitted as error:
    sys.exit(f"{error}")
"""


def said_on_two_nodes(program):
    """What a program prints that makes the network; skips where that may not be."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=FOLDER, capture_output=True, text=True
    )
    if done.returncode == 1 and "Traceback" not in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_short_message_is_shaped_too():
    """However fast the machine: no megabyte passes a slow link at once."""
    took, wanted = map(float, said_on_two_nodes(SEND % SERVE).split())
    assert took > 0.8 * wanted


# Eight senders at once, together far more than a slow link takes in 20 ms.
SEND_MUCH = """
import os, socket, sys
from network import NotPermitted, enter, lost_on_link, two_nodes

SIZE, NUM, GBIT = 1 << 20, 8, 1
%s
try:
    with two_nodes(GBIT) as (here, there):
        listening, told = os.pipe()
        if os.fork() == 0:
            serve(there, told, NUM)
        os.read(listening, 1)
        enter(here)
        out = [socket.create_connection((there.address, 5000)) for _ in range(NUM)]
        left = {one: SIZE for one in out}
        for one in out:
            one.setblocking(False)
        while any(left.values()):
            for one in out:
                try:
                    left[one] -= one.send(bytes(left[one]))
                except BlockingIOError:
                    pass
        os.wait()
        print(lost_on_link(here).dropped)
except NotPermitted as error:
    sys.exit(f"{error}")
"""


def test_packets_wait_and_are_not_dropped():
    """One that is dropped at the end of a message costs 200 ms."""
    told = said_on_two_nodes(SEND_MUCH % SERVE)
    assert int(told) == 0


DROP = """
import socket, sys
import shaper
from network import NotPermitted, enter, lost_on_link, two_nodes

shaper._QUEUE = 20_000
try:
    with two_nodes(0.001) as (here, there):
        enter(here)
        before = lost_on_link(here)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            for _ in range(100):
                out.sendto(bytes(8000), (there.address, 5000))
        print(lost_on_link(here).dropped - before.dropped)
except NotPermitted as error:
    sys.exit(f"{error}")
"""


def test_what_the_shaper_drops_is_counted():
    told = said_on_two_nodes(DROP)
    assert 50 < int(told) < 100


RATES = """
import sys
from network import NotPermitted, two_nodes
from pyroute2 import NetNS

for gbit in (1, 20, 40, 100):
    try:
        with two_nodes(gbit) as (node, _), NetNS(node.namespace) as inside:
            index = inside.link_lookup(ifname=node.interface)[0]
            (shaper,) = inside.get_qdiscs(index)
            told = shaper.get_attr("TCA_OPTIONS")
            narrow = told.get_attr("TCA_TBF_PARMS")["rate"]
            print((told.get_attr("TCA_TBF_RATE64") or narrow) * 8 / 1e9)
    except NotPermitted as error:
        sys.exit(f"{error}")
"""


def test_a_link_may_be_faster_than_32_bits_can_say():
    """From 34 Gbit/s bytes a second do not fit the kernel's older field."""
    told = said_on_two_nodes(RATES)
    assert [float(rate) for rate in told.split()] == [1, 20, 40, 100]
