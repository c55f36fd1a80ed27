"""What importing all of lorank's public names adds to importing torch and safetensors, in fresh processes.

python -m benchmarks.import_time [--rounds 9]
"""

import argparse
import statistics
import subprocess
import sys

CODE = """
import time, torch, safetensors.torch
start = time.perf_counter()
import lorank
for name in lorank.__all__:
    getattr(lorank, name)
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="processes to start")
    rounds = parser.parse_args().rounds
    command = [sys.executable, "-c", CODE]
    seconds = [float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(rounds)]
    low, high = min(seconds), max(seconds)
    print(f"lorank's public names: median {1000 * statistics.median(seconds):.0f} ms over {rounds} processes", end=" ")
    print(f"(from {1000 * low:.0f} to {1000 * high:.0f} ms), on top of torch and safetensors")


if __name__ == "__main__":
    main()
