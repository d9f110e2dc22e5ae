"""`python -m peft_svf_cli`, and `accelerate launch -m peft_svf_cli`."""

from .app import main

main()
