"""`python -m lit_rlhf` is the `lit-rlhf` command."""

from lit_rlhf.cli import entry

if __name__ == "__main__":
    entry()
