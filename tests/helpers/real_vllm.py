"""A real vLLM server in a process group of its own, from the environment that `make peers-vllm` makes."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

PYTHON = Path(os.environ.get("LIT_RLHF_VLLM", Path(__file__).resolve().parents[2] / ".venv-vllm")) / "bin" / "python"
MISSING = f"no vLLM in {PYTHON.parents[1].name}: make peers-vllm installs it"
START_TIME = 400.0  # seconds
SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS = (
    *("--served-model-name", "policy", "--host", "127.0.0.1", "--generation-config", "vllm", "--enforce-eager"),
    *("--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill"),
)


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class RealVLLM:
    """A running server.

    Args:
        folder: of the model.
        log: file that its output goes to.
        options: of the command line.
        port: where it listens; by default any.
        variables: of its environment, in addition.
    """

    def __init__(
        self,
        folder: str,
        log: Path,
        *options: str,
        port: int | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.log, self.options, self.port = folder, log, options, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(self.port)]
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [*map(str, command), *OPTIONS, *options],
                env={**os.environ, **SETTINGS, "PYTHONPATH": "", **(variables or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it answers."""
        last = time.monotonic() + START_TIME
        while time.monotonic() < last and self.process.poll() is None:
            try:
                with urlopen(f"{self.url}/health", timeout=5):
                    return
            except (URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(f"vLLM did not start:\n{self.log.read_text()[-3000:]}")

    def restart(self) -> "RealVLLM":
        """Return one like it, on the same port; it must have been killed."""
        return RealVLLM(self.folder, self.log, *self.options, port=self.port)

    def workers(self) -> list[int]:
        """Return its process ids but the one that listens."""
        listed = subprocess.run(["ps", "-eo", "pid,pgid"], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, line.split())) for line in listed.splitlines()[1:]]
        return [pid for pid, group in pairs if group == self.process.pid and pid != self.process.pid]

    def kill(self) -> None:
        """Kill all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def run_vllm(folder: str, log: Path, *options: str, variables: dict[str, str] | None = None) -> Iterator[RealVLLM]:
    """Run a server."""
    server = RealVLLM(folder, log, *options, variables=variables)
    try:
        server.wait()
        yield server
    finally:
        server.kill()
