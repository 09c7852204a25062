"""Thousands of calls of changing shapes: memory stays where it was after the first of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# What a service does, in a process of its own: nothing else moves its memory.
SERVICE = """
import gc, itertools, json, sys
from eptc.runtime import Engine

def anonymous():
    gc.collect()
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

words = "the film was a quiet triumph and the actors were good".split()
texts = [" ".join(words[: 1 + i % len(words)]) for i in range(len(words))]
classifier = Engine.load(sys.argv[1], ["cpu"], threads=2)
writer = Engine.load(sys.argv[2], ["cpu"], threads=2)
batches = itertools.cycle(range(1, 7))

def work(classified, written):
    for i in range(classified):
        n = next(batches)
        pairs = [(texts[(i + j) % len(texts)], texts[i % 5]) for j in range(n)]
        classifier.classify(pairs, truncate=True)
    for i in range(written):
        n = next(batches)
        prompts = [texts[(i + j) % len(texts)] for j in range(n)]
        writer.generate(prompts, max_new_tokens=1 + i % 7, truncate=True)

work(800, 120)
sizes = [anonymous()]
for _ in range(4):
    work(600, 80)
    sizes.append(anonymous())
print(json.dumps(sizes))
"""
CALLS = 4 * (600 + 80)
# A leak of 400 bytes a call would not pass; without one it was at most 0.2 MB.
BOUND = 1_000_000  # bytes


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs /proc")
def test_flat_memory(lowered_bert: Any, writer: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVICE, str(lowered_bert.path), str(writer.path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    sizes = json.loads(done.stdout)
    assert max(sizes[1:]) - sizes[0] < BOUND, f"{sizes} after {CALLS} calls"
