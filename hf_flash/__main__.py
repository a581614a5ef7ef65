"""`python -m hf_flash` is the command `hf-flash`."""

from hf_flash.cli import main

main()
