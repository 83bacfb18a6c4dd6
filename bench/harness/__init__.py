"""What the benches share: nothing in here is run by itself.

Every bench: `common.py` (rows, interleaved rounds, timing, tables), `machine.py` (the machine line)
and `memory.py` (the peak memory of a call). `ops.py` runs the benches of single ops. Whole steps:
`cases.py`, `ours.py`, `parity.py`, `clock.py`, `evaluation.py`, `scale.py`, `plots.py`. The kernel
report: `kernel_cases.py`, `kernel_probe.py`. The swaps: `swap_hosts.py`, `swap_plugin.py`.
"""
