"""`python -m peft_svf`, and `accelerate launch -m peft_svf`."""

from .cli.app import main

main()
