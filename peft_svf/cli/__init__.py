"""The command line `peft-svf`. Each command imports what it needs when its work begins, so that help is fast."""
