"""Memory of freed tensors."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from sae_lightning.runs.heap import give_back_freed_memory, keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def pages():
    return int(open("/proc/self/statm").read().split()[1])

if sys.argv[1] == "keep":
    keep_freed_memory()
for number in range(40):
    if number == 30:  # by then memory is laid out
        before = faults()
    x = torch.ones(10_000_000)  # 40 MB
    del x
print(faults() - before)
kept = pages()
give_back_freed_memory()
print(kept - pages())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc has the settings")
@pytest.mark.parametrize("how", ["keep", "as it is"])
def test_freed_memory_is_kept_until_it_is_given_back(how):
    def run(how):
        done = subprocess.run(
            [sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True
        )
        return map(int, done.stdout.split())

    faults, given_back = run(how)
    if how == "keep":
        assert faults < 100, "ten tensors in the memory of the first"
        assert given_back > 4000, "pages of 4 kB: it was there all the time"
    else:
        assert faults > 100, "the system cleared pages again: there is nothing to be gained here"
