"""How far apart the kernels of a CUDA graph lie, by what its process did before it was captured.

    python benchmarks/graph_gaps.py

A graph of small kernels in a row, microseconds a kernel, launch of the graph included; each case in a process of its
own. JSON lines. Why: a decode step is some 3,800 kernels, and 0.3 us more between them is a tenth of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch

KERNELS = 1500


class Case:
    """One process's GPU: a small tensor, and the stream on which graphs are captured."""

    def __init__(self) -> None:
        self.numbers = torch.zeros(1024, device="cuda")
        self.stream = torch.cuda.Stream()
        self._launch(1)

    def _launch(self, kernels: int) -> None:
        """Small kernels on the current stream, waited for."""
        for _ in range(kernels):
            self.numbers.add_(1)
        torch.cuda.synchronize()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A graph of `KERNELS` kernels."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(KERNELS):
                self.numbers.add_(1)
        return graph

    def _use_streams(self, count: int) -> None:
        """Other streams, a kernel on each."""
        for stream in [torch.cuda.Stream() for _ in range(count)]:
            with torch.cuda.stream(stream):
                self._launch(1)

    def first(self) -> torch.cuda.CUDAGraph:
        """Nothing before."""
        return self._capture()

    def launches_before(self) -> torch.cuda.CUDAGraph:
        """30,000 kernels before, on the stream that replays."""
        self._launch(30_000)
        return self._capture()

    def launches_on_its_stream(self) -> torch.cuda.CUDAGraph:
        """12,000 kernels before, on the stream that is captured."""
        with torch.cuda.stream(self.stream):
            self._launch(12_000)
        return self._capture()

    def steps_after(self) -> torch.cuda.CUDAGraph:
        """3,000 replays, five kernels behind each, as in decoding."""
        graph = self._capture()
        for _ in range(3_000):
            graph.replay()
            self._launch(5)
        return graph

    def fifth_in_a_row(self) -> torch.cuda.CUDAGraph:
        """Four others before, gone, and nothing launched between them."""
        for _ in range(4):
            self._capture().replay()
            torch.cuda.synchronize()
        return self._capture()

    def fifth_with_kernels_between(self) -> torch.cuda.CUDAGraph:
        """The same, 1,000 kernels launched behind each."""
        for _ in range(4):
            self._capture().replay()
            self._launch(1_000)
        return self._capture()

    def first_of_five(self) -> torch.cuda.CUDAGraph:
        """The first of five that all live, kernels launched behind each."""
        graphs = []
        for _ in range(5):
            graphs.append(self._capture())
            graphs[-1].replay()
            self._launch(1_000)
        return graphs[0]

    def eight_streams(self) -> torch.cuda.CUDAGraph:
        """Eight other streams in use before."""
        self._use_streams(8)
        return self._capture()

    def twelve_streams(self) -> torch.cuda.CUDAGraph:
        """Twelve."""
        self._use_streams(12)
        return self._capture()

    def twelve_streams_after(self) -> torch.cuda.CUDAGraph:
        """Twelve that are used when the graph is there."""
        graph = self._capture()
        graph.replay()
        self._use_streams(12)
        return graph


CASES = [name for name in vars(Case) if not name.startswith("_")]


def time_replay(graph: torch.cuda.CUDAGraph, repeats: int = 15) -> float:
    """Median seconds of a replay, waited for."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="the default: all")
    options = parser.parse_args()
    cases = options.cases.split(",")
    if len(cases) > 1:
        for case in cases:
            subprocess.run([sys.executable, __file__, "--cases", case], check=True)
        return
    seconds = time_replay(getattr(Case(), cases[0])())
    row = {"case": cases[0], "kernels": KERNELS, "us_a_kernel": round(seconds / KERNELS * 1e6, 3)}
    print(json.dumps(row | {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
