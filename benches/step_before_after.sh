#!/usr/bin/env bash
# Whether a training step takes as long as before: two builds of the step bench in turns, the least of
# all turns each; other programs only add.
#
#   benches/step_before_after.sh BEFORE AFTER [TURNS]
#
# BEFORE and AFTER are executables that `cargo bench --bench step --no-run` names.
set -euo pipefail
before=$(realpath "$1")
after=$(realpath "$2")
python3 - "$before" "$after" "${3:-30}" <<'PYTHON'
import subprocess, sys

sides, turns = sys.argv[1:3], int(sys.argv[3])
CASES = ["nanogpt-char", "llama-char", "quickstart"]
least = [{}, {}]

def measure(binary):
    """Milliseconds of a step of each case; the rest of the bench is not waited for."""
    process = subprocess.Popen([binary, "--bench"], stdout=subprocess.PIPE, text=True)
    found, head = {}, []
    for line in process.stdout:
        words = line.split()
        if len(words) > 2 and words[0] in CASES:
            found[words[0]] = float(words[2])
        elif not found and line.strip():
            head.append(line.strip())
        if len(found) == len(CASES):
            break
    process.kill()
    process.wait()
    return found, head

for turn in range(turns):
    # Whoever goes first in a turn goes second in the next.
    for side in ([0, 1] if turn % 2 == 0 else [1, 0]):
        found, head = measure(sides[side])
        if turn == 0 and side == 0:
            print("\n".join(head[:2]))
        for case, ms in found.items():
            least[side][case] = min(ms, least[side].get(case, ms))

print(f"{'step':<14} {'before ms':>10} {'after ms':>10} {'after/before':>13}   least of {turns} turns")
for case in CASES:
    before, after = (side[case] for side in least)
    print(f"{case:<14} {before:>10.1f} {after:>10.1f} {after / before:>13.3f}")
PYTHON
