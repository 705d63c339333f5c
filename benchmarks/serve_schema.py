"""schemathesis against the server's own OpenAPI description: whatever is sent, it never answers 500.

Not part of the test suite: it needs `pip install schemathesis`. A tiny random model, so that answers cost nothing.

    python benchmarks/serve_schema.py --examples 200
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from server import SMALL, model_and_tokenizer, serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200)
    options = parser.parse_args()
    with serving(*model_and_tokenizer(), SMALL, max_context=200) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
        command += ["--checks", "not_a_server_error", "--max-examples", str(options.examples), "--seed", "1"]
        status = subprocess.run(command, check=False).returncode
        server.wait_until_idle()
        failed = {name: count for name, count in server.metrics().items() if 'status="5' in name and "total" in name}
        print("5xx:", failed or "none")
    raise SystemExit(status or bool(failed))


if __name__ == "__main__":
    main()
