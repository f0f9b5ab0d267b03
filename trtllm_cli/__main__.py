"""`python -m trtllm_cli` is `trtllm`."""

from trtllm_cli.cli import main

if __name__ == "__main__":
    main()
