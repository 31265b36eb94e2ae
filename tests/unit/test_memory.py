"""What the C library does with memory that has been freed."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
from rlhf_kit.memory import keep_freed_memory, return_freed_memory

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024

keep_freed_memory()
blocks = [bytearray(4 << 20) for _ in range(40)]
held, pin = resident(), bytearray(1000)
del blocks
kept = resident()
return_freed_memory()
print(held, kept, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these habits")
def test_freed_memory_is_kept_until_it_is_to_go():
    """160 MB in blocks of a few: they stay for whoever asks next, and go at once when they are told to."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=os.environ)
    held, kept, returned = map(int, result.stdout.split())
    assert kept > held - 20
    assert returned < held - 140
