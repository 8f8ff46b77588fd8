"""Generate the gRPC code beside the `.proto` files: `make proto`, or `python -m serving.proto.generate`.

The code is committed; CI generates it again and fails on a difference. It is made by the oldest supported
grpcio-tools, in a virtual environment of its own: code made by a newer one refuses an older protobuf, not the
reverse. It is made from the repository root, so that the import inside it is `serving.proto`.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The floors of grpcio and protobuf in pyproject.toml belong to this version; it needs pkg_resources.
TOOLS = ("grpcio-tools==1.66.2", "setuptools<81")
PROTOS = ("serving/proto/retrieval.proto", "serving/proto/shard.proto")
# A download of 2.5 MB and one short compilation.
TIMEOUT_S = 300


def tools_python(folder: Path) -> Path:
    """The interpreter of the environment with the pinned tools, made where it is missing."""
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", *TOOLS], check=True, timeout=TIMEOUT_S
        )
        ready.touch()
    return python


def generate(python: Path, out: Path) -> None:
    """Write <name>_pb2.py, its types and <name>_pb2_grpc.py of each under `out`/serving/proto."""
    arguments = [
        "-I.",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        *PROTOS,
    ]
    subprocess.run(
        [python, "-m", "grpc_tools.protoc", *arguments], cwd=ROOT, check=True, timeout=TIMEOUT_S
    )


if __name__ == "__main__":
    generate(
        Path(sys.argv[1]) if len(sys.argv) > 1 else tools_python(ROOT / ".cache" / "proto"), ROOT
    )
