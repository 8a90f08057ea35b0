r"""Plans some placements of a case anew: for another machine, or another network.

    python benchmarks/end_to_end/replan.py CASE --hardware FILE --measured --out CASE2
    python benchmarks/end_to_end/replan.py CASE --gbit 20 --out CASE2

Neither the recording nor CBC is needed, so a machine can be measured, planned for and
run in one go. Without --placement those of `joint` are planned anew: the others do not
look at prices, and stay as they are.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from case import PLANNED, read_case, write_case
from moetuner import read_trace
from plan import add_options, command, hardware_of
from plans import PRICED, Asked, plan_all


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", type=Path, help="a folder of plan.py")
    parser.add_argument("--gbit", type=float, help="between nodes; else as it was")
    add_options(parser)
    parser.set_defaults(spare=1)  # where a placement is, it says how many slots
    options = parser.parse_args()
    before, planned = read_case(options.case), read_trace(options.case / PLANNED)
    gbit = before.gbit if options.gbit is None else options.gbit
    case = replace(
        before,
        hardware=hardware_of(options, gbit),
        gbit=gbit,
        command=f"{before.command}; {command()}",
    )
    asked = Asked.of(case, planned, options)
    plan_all(options.placement or PRICED, asked, case, options.jobs)
    write_case(case, options.out, planned)


if __name__ == "__main__":
    main()
