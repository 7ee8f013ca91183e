"""The environment of the tests, set before any library reads it: no settings, logins, caches or network of the user."""

import atexit
import os
import shutil
import tempfile

# settings of libraries, launchers and this package; LIT_RLHF_SCREENSHOTS is an option of the tests
PREFIXES = ("WANDB_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PL_", "VLLM_", "SLURM_", "TORCHELASTIC_", "OMP_")
NAMES = ("NETRC", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LIT_RLHF_TRACEBACK")
SECRETS = ("LIT_RLHF_REWARD_TOKEN", "OPENAI_API_KEY", "PERSPECTIVE_API_KEY")

for name in list(os.environ):
    if name.startswith(PREFIXES) or name in (*NAMES, *SECRETS):
        del os.environ[name]
home = tempfile.mkdtemp(prefix="lit-rlhf-tests-")
owner = os.getpid()
atexit.register(lambda: os.getpid() == owner and shutil.rmtree(home, ignore_errors=True))
os.environ |= {"HOME": home, "HF_HUB_OFFLINE": "1", "NO_PROXY": "*", "no_proxy": "*"}
# several workers share the cores; the command would choose it on a busy machine, and say so
os.environ["OMP_WAIT_POLICY"] = "passive"
